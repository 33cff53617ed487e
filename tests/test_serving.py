from __future__ import annotations

import pytest

from falqon_fx import serving


@pytest.fixture(autouse=True)
def _no_sites(monkeypatch):
    monkeypatch.setattr(serving, "_paths", {})


def test_sites_of_different_layers_stand_together():
    for layer in (0, 1, 2, 3, 7):
        for name in ("q_proj", "o_proj"):
            serving.announce(64, 32, f"model.layers.{layer}.attn.{name}")
    serving.announce(64, 32, "model.layers.9.mlp.experts.4.up")
    serving.announce(64, 32, "head")
    assert serving.sites([(64, 32)]) == (
        "model.layers.{0-3,7}.attn.q_proj, model.layers.{0-3,7}.attn.o_proj, "
        "model.layers.9.mlp.experts.4.up, head"
    )


def test_a_number_within_a_name_is_part_of_it():
    for name in ("conv1", "conv2", "block2d"):
        serving.announce(64, 32, f"net.{name}")
    assert serving.sites([(64, 32)]) == "net.conv1, net.conv2, net.block2d"


def test_either_size_may_be_left_open():
    serving.announce(64, 32, "a")
    serving.announce(16, 32, "b")
    serving.announce(64, 8, "c")
    assert serving.sites([(64, 32)]) == "a"
    assert serving.sites([(None, 32)]) == "a, b"
    assert serving.sites([(64, None)]) == "a, c"
    assert serving.sites([(16, 32), (64, 8)]) == "b, c"
    assert serving.sites([(1, 1)]) == serving.sites([]) == ""


def test_a_site_counts_once_and_many_are_cut_short():
    for _ in range(2):
        for i in range(14):
            serving.announce(64, 32, "site" + "x" * i)
    assert serving.known() == 14
    assert serving.sites([(64, 32)]).endswith("site" + "x" * 11 + " and 2 more")
