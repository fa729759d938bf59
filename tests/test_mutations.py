"""Damaged and hostile checkpoints: nothing crashes, runs or is loaded that should not be."""

from __future__ import annotations

import os

import checkpoint_mutations as mutations
import pytest
import torch
from torch import nn

from vitarium.checkpoints import CheckpointError, unwrap


def test_no_mutation_gets_through():
    table, failures = mutations.run(300, seed=0)
    assert not failures
    assert sum(row["made"] for row in table.values()) == 300
    assert all(row["refused"] for row in table.values())
    assert sum(row["harmless"] for row in table.values()) > 10


def unchecked(model: nn.Module, source: object) -> None:
    """A loader that trusts its file."""
    if not isinstance(source, dict):
        try:
            source = torch.load(source, weights_only=False)
        except Exception as error:
            raise CheckpointError(str(error)) from error
    model.load_state_dict(mutations.TABLE.to_ours(unwrap(source), model))


def test_the_judge_finds_readers_that_trust_their_files():
    table, failures = mutations.run(200, seed=0, loader=unchecked)
    ran = sum("code ran: ['trace'] appeared" in line for line in failures)
    assert ran > table["hostile pickle"]["made"] / 4, "the hostile pickles are harmless"
    assert any("accepted with other tensors" in line for line in failures)
    assert any("load and read differ" in line for line in failures)


def test_the_judge_finds_readers_that_accept_everything():
    def accept(model, source):
        return None

    _, failures = mutations.run(50, seed=0, loader=accept)
    assert len(failures) == 50
    assert all("accepted with other tensors" in line for line in failures)
    _, failures = mutations.run(50, seed=0, fetcher=accept)
    assert [line.partition(": ")[2].partition(": ")[2] for line in failures] == [
        "accepted although the hash is known"
    ] * 50


def test_the_judge_finds_readers_that_die():
    def die(model, source):
        os.abort()

    table, failures = mutations.run(3, seed=0, loader=die)
    assert len(failures) == 3
    assert all("the process died (-6)" in line for line in failures)
    assert sum(row["wrong"] for row in table.values()) == 3


def test_the_judge_finds_readers_that_take_all_memory():
    def greedy(model, source):
        try:
            bytearray(2 * mutations.BYTES)
        except MemoryError as error:
            raise CheckpointError("damaged") from error

    _, failures = mutations.run(3, seed=0, loader=greedy)
    assert len(failures) == 3
    assert all("more than 2 GiB were asked for" in line for line in failures)


@pytest.mark.parametrize("base", mutations.BASES, ids=lambda base: f"{base.kind}-{base.wrapped}")
def test_undamaged_files_are_loaded(base, tmp_path):
    model = mutations.Net()
    (tmp_path / "x.pth").write_bytes(base.data)
    mutations.load(model, tmp_path / "x.pth")
    held = {name: mutations.raw(tensor) for name, tensor in model.state_dict().items()}
    assert held == mutations.written(base.state)
    assert mutations.Mutation("", base, base.data).allows(held)
    assert base.spans.keys() == held.keys()
