import json
import warnings
from pathlib import Path

import pytest
import torch

from falqon_fx.kernels import cache
from falqon_fx.kernels.products.choice import Choices, environment_of
from falqon_fx.kernels.spec import library_version
from tests import fresh


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FALQON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Clock:
    """Says what it is told a candidate took, and counts."""

    def __init__(self, **seconds):
        self.seconds, self.timed = seconds, []

    def __call__(self, run):
        name = run()
        self.timed.append(name)
        return self.seconds[name]


def candidates(*names):
    return {name: lambda name=name: name for name in names}


def refuse():
    raise ValueError("K is odd\nand more")


def test_the_fastest_wins_and_is_timed_once(folder):
    clock = Clock(a=3.0, b=1.0, c=2.0)
    choices = Choices("card", clock)
    chosen = choices.get("p", candidates("a", "b", "c"))
    assert chosen.winner == "b"
    assert choices.get("p", candidates("a", "b", "c")) is chosen
    assert clock.timed == ["a", "b", "c"]
    assert str(chosen) == "p: b, 2.00x the speed of c"
    assert choices.known("p", "auto") is chosen
    assert choices.known("p", "triton") is choices.known("q", "auto") is None


def test_another_process_reads_the_choice(folder):
    Choices("card", Clock(a=1.0, b=2.0)).get("p", candidates("a", "b"))
    silent = Clock()
    again = Choices("card", silent).get("p", candidates("a", "b"))
    assert (again.winner, again.seconds, silent.timed) == ("a", {"a": 1.0, "b": 2.0}, [])


@pytest.mark.parametrize("change", ["environment", "key", "wanted", "winner gone"])
def test_what_a_choice_depends_on_makes_a_new_one(folder, change):
    Choices("card", Clock(a=1.0, b=2.0)).get("p", candidates("a", "b"))
    clock = Clock(a=2.0, b=1.0)
    choices = Choices("other" if change == "environment" else "card", clock)
    names = ["b"] if change == "winner gone" else ["a", "b"]
    wanted = "b" if change == "wanted" else "auto"
    chosen = choices.get("q" if change == "key" else "p", candidates(*names), wanted)
    assert chosen.winner == "b"
    assert clock.timed


def test_a_candidate_that_refuses_is_passed_over_with_its_reason(folder):
    chosen = Choices("card", Clock(b=1.0)).get("p", {"a": refuse, **candidates("b")})
    assert chosen.winner == "b"
    assert chosen.refused == {"a": "K is odd"}
    assert "not a: K is odd" in str(chosen)


def test_a_candidate_whose_numbers_are_wrong_is_passed_over(folder):
    """One element of 4096 is a difference of 2**-6; roundings to bfloat16 are not one."""
    right = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) + 4.0
    wrong, lost = right.clone(), right.clone()
    wrong[3, 5] += right.norm() * 2.0**-5
    lost[0, 0] = float("nan")
    made = {
        "triton:wrong": lambda: [wrong],
        "triton:lost": lambda: [lost],
        "triton:rounded": lambda: [right.bfloat16()],
        "dequantize": lambda: [right],
    }
    chosen = Choices("card", lambda run: 1.0 + float(len(run()) == 0)).get("p", made, "triton")
    assert chosen.winner == "triton:rounded"
    assert set(chosen.refused) == {"triton:wrong", "triton:lost"}
    assert "off by 0.03" in chosen.refused["triton:wrong"]
    assert "off by nan" in chosen.refused["triton:lost"]


def test_a_fault_of_the_card_is_an_error(folder):
    def fault():
        raise torch.AcceleratorError("an illegal memory access was encountered")

    with pytest.raises(torch.AcceleratorError, match="illegal"):
        Choices("card", Clock(b=1.0)).get("p", {"a": fault, **candidates("b")})


def test_a_choice_made_while_memory_is_short_is_not_kept(folder):
    def exhausted():
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 2 GiB")

    clock = Clock(a=1.0, b=2.0, c=1.0)
    choices, crowded = Choices("card", clock), {"a": exhausted, **candidates("b")}
    assert choices.get("p", crowded).winner == "b"
    assert choices.get("p", crowded).refused == {"a": "out of memory. Tried to allocate 2 GiB"}
    assert clock.timed == ["b"]  # in this process it holds
    choices.get("q", candidates("c"))  # which is kept, and not p with it
    assert Choices("card", clock).get("p", candidates("a", "b")).winner == "a"


def test_an_error_that_is_no_refusal_is_not_swallowed(folder):
    def broken():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        Choices("card", Clock()).get("p", {"a": broken})


def test_no_candidate_is_an_error_that_gives_each_reason(folder):
    with pytest.raises(ValueError, match="no kernel takes p: a: K is odd"):
        Choices("card", Clock()).get("p", {"a": refuse})


def test_a_forced_kernel_is_the_only_one_tried(folder):
    clock = Clock(**{"triton:1": 2.0, "triton:2": 1.0})
    chosen = Choices("card", clock).get("p", candidates("lib", "triton:1", "triton:2"), "triton")
    assert chosen.winner == "triton:2"
    with pytest.raises(ValueError, match="kernel='cutlass': p has lib"):
        Choices("card", clock).get("p", candidates("lib"), "cutlass")


def test_nothing_is_timed_while_a_graph_is_captured(folder):
    clock = Clock()
    assert Choices("card", clock).get("p", candidates("a", "b"), time=False).winner == "a"
    assert clock.timed == []
    assert not folder.exists()


CRAFTED = (
    b'{"environment": "card", "choices": [{"key": "p", "wanted": "auto", "winner": "a", '
    b'"seconds": %s, "refused": %s}]}'
)


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b'{"environment": "card"}',
        b'{"environment": "card", "choices": 3}',
        b'{"environment": "card", "choices": [[]]}',
        b"[" * 100_000,
        CRAFTED % (b'{"a": "fast"}', b"{}"),
        CRAFTED % (b'{"b": 1.0}', b"{}"),
        CRAFTED % (b"[]", b"{}"),
        CRAFTED % (b'{"a": 1.0}', b"3"),
    ],
)
def test_damaged_file_is_rebuilt(folder, damage):
    choices = Choices("card", Clock(a=1.0))
    Path(choices.path).parent.mkdir(parents=True)
    Path(choices.path).write_bytes(damage)
    assert choices.get("p", candidates("a")).seconds == {"a": 1.0}
    assert json.loads(Path(choices.path).read_bytes())["choices"][0]["winner"] == "a"


def test_choices_of_two_processes_are_both_kept(folder):
    one, two = Choices("card", Clock(a=1.0)), Choices("card", Clock(a=1.0))
    assert one.known("p", "auto") is two.known("q", "auto") is None
    one.get("p", candidates("a"))
    two.get("q", candidates("a"))
    again = Choices("card", Clock())
    assert again.known("p", "auto") is not None
    assert again.known("q", "auto") is not None


def test_processes_that_choose_at_once_never_see_a_partial_file(folder):
    code = """
from falqon_fx.kernels.products.choice import Choices
for i in range(40):
    choices = Choices("card", lambda run: run())
    assert choices.get(f"{name} {i}", {"a": lambda: 1.0}).winner == "a"
"""
    processes = [fresh.start(f"name = {i}\n{code}", warnings="error") for i in range(2)]
    for process in processes:
        done = process.wait()
        assert done.returncode == 0, done.stderr
    # A process that reads while another writes may lose a line of it, never the file.
    kept = json.loads(Path(Choices("card", Clock()).path).read_bytes())["choices"]
    assert len(kept) >= 40


def test_unwritable_folder_works_from_memory_with_one_warning(tmp_path, monkeypatch):
    blocker = tmp_path / "file"
    blocker.touch()
    monkeypatch.setenv("FALQON_CACHE", str(blocker / "choices"))
    cache._warn_unwritable.cache_clear()
    clock = Clock(a=1.0)
    choices = Choices("card", clock)
    with pytest.warns(RuntimeWarning, match="set FALQON_CACHE"):
        choices.get("p", candidates("a"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choices.get("q", candidates("a"))
        choices.get("p", candidates("a"))
    assert clock.timed == ["a", "a"]


def test_environment_names_versions():
    text = environment_of(torch.device("cpu"))
    assert torch.__version__ in text
    assert library_version() in text
