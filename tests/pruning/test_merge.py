"""Joining tokens against plain loops."""

from __future__ import annotations

import pytest
import torch

from ztp_deploy.pruning.merge import Joining, destination_slots, directions, forced_joining, join, partner_margin
from ztp_deploy.pruning.tokens import TokenState


@pytest.mark.parametrize("special", [0, 1, 2])
@pytest.mark.parametrize("weighed", [True, False])
def test_join_is_the_weighted_mean(special, weighed):
    rows = torch.randn(2, special + 5, 3, dtype=torch.float64)  # three stay, two leave
    target = torch.tensor([[1, 1], [2, 0]])
    weights = torch.tensor([[1.0, 2, 3, 4, 5], [5, 4, 3, 2, 1]])
    joined, total = join(rows, target, 3, special, weights if weighed else None)
    counted = weights if weighed else torch.ones(2, 5)
    for image in range(2):
        assert torch.equal(joined[image, :special], rows[image, :special])
        assert total[image, :special].tolist() == [1] * special
        for slot in range(3):
            members = [slot] + [3 + index for index in range(2) if target[image, index] == slot]
            own = counted[image, members].double()
            mean = (own.unsqueeze(1) * rows[image, [special + member for member in members]]).sum(0) / own.sum()
            torch.testing.assert_close(joined[image, special + slot], mean, rtol=1e-6, atol=1e-6)
            assert total[image, special + slot] == own.sum()


def test_join_keeps_the_type_of_the_tokens():
    joined, total = join(torch.ones(1, 4, 2, dtype=torch.float16), torch.tensor([[0]]), 2, 1, torch.full((1, 3), 300.0))
    assert (joined.dtype, total.dtype) == (torch.float16, torch.float32)
    assert joined.tolist() == [[[1, 1]] * 3]


def test_landing_says_where_every_slot_goes():
    joining = Joining(torch.tensor([[4, 0, 2]]), torch.tensor([[1]]), torch.tensor([[2]]))
    assert joining.order.tolist() == [[4, 0, 2, 1]]
    assert joining.destination_slots(6).tolist() == [[1, 2, 2, -1, 0, -1]]
    assert joining.destination_slots(6).dtype == torch.int32
    assert destination_slots(torch.tensor([[3, 1]]), torch.tensor([[0, 1]]), 4).tolist() == [[-1, 1, -1, 0]]


def test_directions_have_length_one_and_zeros_stay():
    features = directions(torch.tensor([[[3.0, 4.0], [0.0, 0.0]]]).half())
    torch.testing.assert_close(features, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


def test_forced_joining_follows_a_table_of_fates():
    state = TokenState(positions=torch.tensor([[7, 3, 5, 1]], dtype=torch.int32))
    destinations = torch.full((1, 9), -1)
    destinations[0, 7], destinations[0, 3], destinations[0, 5], destinations[0, 1] = (
        7,
        1,
        -1,
        1,
    )  # 3 joins 1, 5 is dropped
    joining = forced_joining(destinations, state, 2, 1, torch.arange(4))
    assert (joining.stay.tolist(), joining.leave.tolist(), joining.target.tolist()) == ([[0, 3]], [[1]], [[1]])
    backwards = forced_joining(destinations, state, 2, 1, torch.tensor([3, 2, 1, 0]))
    assert (backwards.stay.tolist(), backwards.leave.tolist()) == ([[3, 0]], [[1]])
    assert backwards.target.tolist() == [[0]]


def test_partner_margins_sit_at_their_pairs():
    similarity = torch.tensor([[[0.5, 0.9, 0.8]]])
    margin = partner_margin(similarity, torch.tensor([[2]]), torch.tensor([[0, 1, 3]]), 4)
    expected = torch.full((1, 4, 4), -torch.inf)
    expected[0, 2, [0, 1, 3]] = torch.tensor([-0.4, 0.1, -0.1])
    torch.testing.assert_close(margin, expected)
    tie = partner_margin(torch.tensor([[[0.5, 0.5]]]), torch.tensor([[1]]), torch.tensor([[0, 2]]), 3)
    assert (tie[0, 1] > 0).tolist() == [True, False, False]
    lonely = partner_margin(torch.tensor([[[0.5]]]), torch.tensor([[1]]), torch.tensor([[0]]), 2)
    assert lonely[0, 1, 0] == torch.inf
