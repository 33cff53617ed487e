"""The generated part of options.md: every option of `FalqonConfig`, its values, default and text.

python docs/options.py          # prints it
python docs/options.py --write  # puts it into options.md

It reads the source, without importing the library.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import griffe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "options.md"
BEGIN, END = "<!-- options: begin -->\n", "<!-- options: end -->\n"


def texts(config: griffe.Class) -> dict[str, str]:
    """The description of each option in the docstring."""
    assert config.docstring is not None
    found: dict[str, str] = {}
    for section in config.docstring.parse("google"):
        if isinstance(section, griffe.DocstringSectionParameters):
            found |= {p.name: p.description.replace("``", "`") for p in section.value}
    return found


def values(annotation: str, aliases: dict[str, str]) -> list[str]:
    """What an option takes: each value of a `Literal`, the name of any other type."""
    node = ast.parse(aliases.get(annotation, annotation), mode="eval").body
    if isinstance(node, ast.BinOp):
        sides = (ast.unparse(side) for side in (node.left, node.right))
        return [value for side in sides for value in values(side, aliases)]
    if isinstance(node, ast.Subscript) and ast.unparse(node.value) == "Literal":
        members = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return [_quoted(member) for member in members]
    return [_quoted(node)]


def _quoted(node: ast.expr) -> str:
    return ast.unparse(node).replace("'", '"')


def entry(option: griffe.Attribute, text: str, aliases: dict[str, str]) -> str:
    """One option as a section, so that a link can lead to it."""
    taken = ", ".join(f"`{value}`" for value in values(str(option.annotation), aliases))
    default = _quoted(ast.parse(str(option.value), mode="eval").body)
    if "default_factory" in default:
        default = "{}"
    text = text[0].upper() + text[1:]
    return f"### `{option.name}`\n\nValues: {taken}. Default: `{default}`.\n\n{text}\n"


def options() -> str:
    """All of them, in the order of the class."""
    module = griffe.load("falqon_fx.config", search_paths=[ROOT])
    config = module["FalqonConfig"]
    described = texts(config)
    aliases = {name: str(each.value) for name, each in module.attributes.items()}
    fields = [a for a in config.attributes.values() if a.annotation is not None]
    return "\n".join(entry(field, described[field.name], aliases) for field in fields)


def main() -> None:
    """Print the text, or write it."""
    if "--write" not in sys.argv[1:]:
        print(options())
        return
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    page = f"{before}{BEGIN}\n{options()}\n{END}{rest.split(END)[1]}"
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
