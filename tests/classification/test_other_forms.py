"""Weights as others save them: two networks in a file, heads apart, keys that say other things."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from classification.errors import UserError
from classification.models import build
from classification.models.states import choose_state, find_states
from classification.system.weight_files import read_checkpoint
from tests.classification.models.test_forms import loaded, prefixed, same, state_of


def test_of_two_networks_of_the_same_names_the_one_that_fits_is_taken(tmp_path: Path) -> None:
    wide = {
        name: value.repeat(2, *[1] * (value.ndim - 1)) if value.ndim else value for name, value in state_of(2).items()
    }
    for content in ({"teacher": wide, "net_s": state_of()}, {**prefixed(wide, "0."), **prefixed(state_of(), "1.")}):
        assert same(loaded(content, tmp_path / "w.pth")[0], state_of())


def test_a_head_under_a_name_of_its_own_is_found(tmp_path: Path) -> None:
    body, head = (prefixed({n: v for n, v in state_of().items() if n.startswith(start)}, before)
                  for start, before in (("model.", "backbone."), ("module.", "head.")))  # fmt: skip
    assert same(loaded({"state_dict": {**body, **head}}, tmp_path / "w.pth")[0], state_of())
    other = prefixed(state_of(2), "teacher.")  # not the head of another whole network
    with pytest.raises(UserError, match="does not fit"):
        loaded(
            {**body, **other, "teacher.more.weight": torch.ones(1)} | {"backbone.module.bias": torch.ones(3)},
            tmp_path / "w.pth",
        )


def test_arrays_and_counts_of_operations_are_no_matter(tmp_path: Path) -> None:
    arrays = {"model": {name: value.numpy() for name, value in state_of().items()}, "mean": np.full(3, 0.5)}
    assert same(loaded(arrays, tmp_path / "w.pth")[0], state_of())
    counts = {name: torch.zeros(1) for name in ("total_ops", "total_params", "model.0.total_ops")}
    assert same(loaded({**state_of(), **counts}, tmp_path / "w.pth")[0], state_of())


def test_the_query_encoder_is_taken_before_its_average(tmp_path: Path) -> None:
    both = {**prefixed(state_of(2), "module.encoder_k."), **prefixed(state_of(), "module.encoder_q.")}
    assert same(loaded(both, tmp_path / "w.pth")[0], state_of())


@pytest.mark.parametrize(
    "said",
    [
        {"classes": 3}, {"classes": {"a", "b"}}, {"class_names": "cat,dog,eel"}, {"num_classes": "3"},
        {"arch": {"type": "ResNet"}}, {"img_size": (24, 32)}, {"mean": [0.1] * 100},
        {"mean": [-1.0] * 3, "std": [2.0] * 3},
    ],
)  # fmt: skip
def test_the_same_keys_may_say_other_things_in_files_of_others(said: dict[str, Any], tmp_path: Path) -> None:
    state, line = loaded({"state_dict": state_of(), **said}, tmp_path / "w.pth")
    names = " and ".join(map(repr, said))
    assert same(state, state_of()) and f"what it says under {names} is not understood, and not used" in line
    with pytest.raises(UserError, match="is damaged"):  # in ours they may not
        loaded({"state_dict": state_of(), "format": 4, **said}, tmp_path / "w.pth")


def test_a_name_that_is_no_network_here_is_no_contradiction(tmp_path: Path) -> None:
    assert same(loaded({"state_dict": state_of(), "arch": "models.MyNet"}, tmp_path / "w.pth")[0], state_of())
    with pytest.raises(UserError, match="holds a resnet18"):
        loaded({"state_dict": state_of(), "arch": "resnet18"}, tmp_path / "w.pth")


def test_names_of_the_authors_are_turned_into_those_of_timm() -> None:
    """As ConvNeXt was published: github.com/facebookresearch/ConvNeXt, models/convnext.py."""
    model = build("timm:convnext_atto", 3)
    names = (
        (r"^stem\.", "downsample_layers.0."), (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."), ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"),
        (r"^head\.norm\.", "norm."), (r"^head\.fc\.", "head."),
    )  # fmt: skip
    theirs = {}
    for name, value in model.state_dict().items():
        for ours, published in names:
            name = re.sub(ours, published, name)
        theirs[name] = value.reshape(value.shape[:2]) if "pwconv" in name and "weight" in name else value  # linear
    found = choose_state(model, find_states({"model": theirs}))
    assert "stages.0.0.dwconv.weight" in theirs and same(found.state, dict(model.state_dict()))


def test_the_list_of_several_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text('{"metadata": {}, "weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    with pytest.raises(UserError, match="weights in several files: join those"):
        read_checkpoint(tmp_path / "w.json")


def test_training_starts_from_a_body_without_a_head(tmp_path: Path) -> None:
    body = {name: value for name, value in state_of(2).items() if name.startswith("model.")}
    state, line = loaded(prefixed(body, "backbone."), tmp_path / "w.pth", new_head=True)
    assert same({name: state[name] for name in body}, body) and "has no head: it is fresh" in line
    with pytest.raises(UserError, match="2 missing"):
        loaded(body, tmp_path / "w.pth")  # a teacher, or an evaluation
    del body["model.0.weight"]
    with pytest.raises(UserError, match="3 missing"):
        loaded(body, tmp_path / "w.pth", new_head=True)
