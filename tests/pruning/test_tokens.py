"""Top-k, gather and membership against plain indexing."""

from __future__ import annotations

import torch

from ztp_deploy.pruning.tokens import TokenState, initial_state, keep_tokens, mask_slots, membership, take, top_k


def test_top_k_is_sorted_and_breaks_ties_to_the_lower_index():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_k(scores, 3).tolist() == [[1, 2, 4], [0, 1, 2]]
    # Many ties, where torch.topk gives any of them.
    assert top_k(torch.zeros(1, 1000), 7).tolist() == [list(range(7))]


def test_take_equals_indexing():
    values = torch.randn(3, 7, 5)
    index = torch.tensor([[6, 0], [1, 2], [3, 3]])
    for image in range(3):
        assert torch.equal(take(values, index)[image], values[image, index[image]])
        assert torch.equal(take(values, index - 1, skip=1)[image], values[image, index[image]])


def test_membership_counts_each_slot_once():
    index = torch.tensor([[0, 3], [4, 2]])
    assert membership(index, 5).tolist() == [[1, 0, 0, 1, 0], [0, 0, 1, 0, 1]]
    assert membership(index, 6, skip=1).tolist() == [[0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]]


def test_keep_tokens_keeps_special_tokens_first_and_positions_in_step():
    tokens = torch.arange(2 * 6).reshape(2, 6, 1).float()  # two special tokens, four patches
    state = TokenState(positions=torch.tensor([[10, 11, 12, 13], [20, 21, 22, 23]], dtype=torch.int32))
    kept = torch.tensor([[3, 0], [1, 2]])
    thin, after = keep_tokens(tokens, state, kept, special_tokens=2)
    assert thin[..., 0].tolist() == [[0, 1, 5, 2], [6, 7, 9, 10]]
    assert after.positions.tolist() == [[13, 10], [21, 22]]
    assert after.positions.dtype == torch.int32


def test_without_special_tokens():
    tokens = torch.arange(4).reshape(1, 4, 1).float()
    thin, after = keep_tokens(tokens, initial_state(tokens, 4), torch.tensor([[2, 1]]), special_tokens=0)
    assert thin[0, :, 0].tolist() == [2, 1]
    assert after.positions.tolist() == [[2, 1]]


def test_masked_slots_lose_position_and_are_not_attended_to():
    state = mask_slots(initial_state(torch.zeros(1, 3), 3), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert state.positions.tolist() == [[-1, 1, -1]]
    assert state.positions.dtype == torch.int32
    assert state.alive.tolist() == [[1, 0, 1, 0]]
    weights = (torch.randn(2, 2, 4, 4) + state.bias).softmax(-1)
    assert weights[..., [1, 3]].abs().max() == 0
    again = keep_tokens(torch.zeros(1, 4, 2), state, torch.tensor([[1]]), special_tokens=1)[1]
    assert again.bias.tolist() == [[[[0, 0]]]]
    assert again.positions.tolist() == [[1]]
