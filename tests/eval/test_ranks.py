"""What processes share: with one process nothing changes, and what torchrun did not start is refused."""

import numpy as np
import pytest

from robx.errors import InputError
from robx.eval.neighbours import nearest
from robx.eval.ranks import Ranks, join


def test_one_process_shares_with_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with join() as ranks:
        assert ranks == Ranks() and ranks.first
    rows = np.arange(6).reshape(3, 2)
    assert ranks.gather(None) is None and ranks.gather(rows) is rows and ranks.all_rows(rows) is rows
    features = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    for one, other in zip(ranks.nearest(features, features, 3), nearest(features, features, 3), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("images", [0, 1, 2, 7])
def test_the_shares_are_disjoint_and_together_everything(images):
    shares = [list(Ranks(rank=rank, size=3).share(images)) for rank in range(3)]
    assert sorted(index for share in shares for index in share) == list(range(images))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_processes_that_torchrun_did_not_start_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(InputError, match="start the processes with torchrun"), join():
        pass
