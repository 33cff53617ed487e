"""What a report adds up to: bytes of the weights, predicted time, and one sentence of both."""

from __future__ import annotations

from falqon_fx.report.data import Graphs


def weight_bytes(report: Graphs) -> tuple[int, int] | None:
    """Bytes before, and after `prepare`; a weight that is used twice in one model is kept once."""
    kept = {site.path: site.memory for site in report.sites if site.memory}
    if not kept:
        return None
    return sum(m.before for m in kept.values()), sum(m.after for m in kept.values())


def predicted_seconds(report: Graphs) -> tuple[float, float] | None:
    """Seconds of a step in all sites, before and after."""
    costs = [site.cost for site in report.sites if site.cost]
    if not costs:
        return None
    return sum(c.seconds_before for c in costs), sum(c.seconds_after for c in costs)


def sentence(report: Graphs) -> str:
    """What happens to this model, in one sentence."""
    adapted = sum(site.adapters > 0 for site in report.sites)
    rejected, left = (len({r.site for r in items}) for items in (report.rejected, report.left))
    many = "1 layer runs" if len(report.sites) == 1 else f"{len(report.sites)} layers run"
    parts = [
        f"{many} in FP8, {adapted} with an adapter and {len(report.sites) - adapted} frozen",
        f"{rejected} rejected, {left} left as it was",
    ]
    if size := weight_bytes(report):
        before, after = (value / 1e6 for value in size)
        parts.append(f"their weights take {after:.4g} MB instead of {before:.4g} MB once prepared")
    if time := predicted_seconds(report):
        before, after = (value * 1e3 for value in time)
        card = next(site.cost.card for site in report.sites if site.cost)
        parts.append(
            f"a step in them is predicted to take {after:.4g} ms instead of {before:.4g} ms on "
            f"{card}"
        )
    return f"{'; '.join(parts)}."
