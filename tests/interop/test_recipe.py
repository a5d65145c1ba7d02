"""Recipes of tensors: the pieces of each form, there and back, number by number."""

from __future__ import annotations

import pytest
import torch

from qsparse_moe.interop.families.recipe import (
    Piece,
    buffer,
    copied,
    fused_experts,
    joined,
    joined_vectors,
    stacked,
    transposed,
)


def read_from(tensors):
    def read(piece):
        value = tensors[piece.name]
        assert tuple(value.shape) == piece.shape
        return piece.in_our_order(value if piece.index is None else value[piece.index])

    return read


def numbers(*shape, first=0):
    size = torch.Size(shape).numel()
    return torch.arange(first, first + size, dtype=torch.float32).view(shape)


def test_joined_matrices_lie_one_below_the_other_in_our_order_of_rows():
    recipe = joined(2, {"q": 3, "k": 1}, {"q": (2, 0, 1)})
    tensors = {"q": numbers(3, 2), "k": numbers(1, 2, first=10)}
    whole = recipe.build(read_from(tensors), torch.float32)
    assert recipe.shape == (4, 2) and whole.tolist() == [[4, 5], [0, 1], [2, 3], [10, 11]]
    back = {piece.name: recipe.stored(whole[place], piece) for place, piece in recipe.places()}
    assert [place for place, _ in recipe.places()] == [slice(0, 3), slice(3, 4)]
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)


def test_joined_vectors_follow_each_other():
    recipe = joined_vectors({"q": 2, "k": 3})
    whole = recipe.build(read_from({"q": numbers(2), "k": numbers(3, first=5)}), torch.float64)
    assert (recipe.shape, whole.tolist(), whole.dtype) == ((5,), [0, 1, 5, 6, 7], torch.float64)


def test_three_matrices_follow_each_other():
    recipe = joined(1, {"q": 2, "k": 1, "v": 2})
    tensors = {"q": numbers(2, 1), "k": numbers(1, 1, first=5), "v": numbers(2, 1, first=8)}
    assert recipe.build(read_from(tensors), torch.float32).flatten().tolist() == [0, 1, 5, 8, 9]
    assert [place for place, _ in recipe.places()] == [slice(0, 2), slice(2, 3), slice(3, 5)]


def test_a_single_piece_is_no_copy_and_keeps_its_dtype():
    stored = numbers(3, 2)
    for recipe, want in ((copied("w", 3, 2), stored), (transposed("w", 2, 3), stored.T)):
        found = recipe.build(read_from({"w": stored}), torch.bfloat16)
        assert torch.equal(found, want) and found.data_ptr() == stored.data_ptr() and found.dtype == torch.float32
        ((place, piece),) = recipe.places()
        assert place == slice(0, recipe.shape[0]) and torch.equal(recipe.stored(found[place], piece), stored)
    assert transposed("w", 2, 3).shape == (2, 3) and not copied("w", 3).keeps_dtype and buffer("w", 3).keeps_dtype


def test_stacked_matrices_are_one_per_expert_and_transposed():
    recipe = stacked(lambda expert: f"e{expert}", 3, 2, 4)
    tensors = {f"e{expert}": numbers(4, 2, first=100 * expert) for expert in range(3)}
    whole = recipe.build(read_from(tensors), torch.float32)
    assert whole.shape == recipe.shape == (3, 2, 4) and whole[2].tolist() == [
        [200, 202, 204, 206],
        [201, 203, 205, 207],
    ]
    assert [place for place, _ in recipe.places()] == [0, 1, 2]
    for place, piece in recipe.places():
        assert torch.equal(recipe.stored(whole[place], piece), tensors[piece.name])
    assert recipe.part(tensors["e1"]).tolist() == whole[1:2].tolist()
    one = stacked(lambda expert: "e0", 1, 2, 4).build(read_from(tensors), torch.float32)
    assert one.tolist() == whole[:1].tolist()


def test_fused_experts_have_gate_above_up_and_down_apart():
    width, hidden = 2, 3
    recipes = fused_experts("x", 2, width, hidden)
    tensors = {"x.gate_up_proj": numbers(2, 2 * hidden, width), "x.down_proj": numbers(2, width, hidden, first=50)}
    found = {name: recipe.build(read_from(tensors), torch.float32) for name, recipe in recipes.items()}
    assert found["w_gate"][1].tolist() == [[12, 14, 16], [13, 15, 17]]
    assert found["w_up"][1].tolist() == [[18, 20, 22], [19, 21, 23]]
    assert found["w_down"][1].tolist() == [[56, 59], [57, 60], [58, 61]]
    assert {name: recipe.shape for name, recipe in recipes.items()} == {
        "w_gate": (2, 2, 3),
        "w_up": (2, 2, 3),
        "w_down": (2, 3, 2),
    }
    assert all(found[name].shape == recipe.shape for name, recipe in recipes.items())


@pytest.mark.parametrize(
    ("piece", "index"),
    [
        (Piece("w", (4, 6, 2)), None),
        (Piece("w", (4, 6, 2), 3), (3, slice(None))),
        (Piece("w", (4, 6, 2), 0, "first"), (0, slice(0, 3))),
        (Piece("w", (4, 6, 2), 1, "second"), (1, slice(3, 6))),
    ],
)
def test_a_piece_is_the_whole_a_matrix_or_half_of_its_rows(piece, index):
    assert piece.index == index


def test_an_order_of_rows_is_undone_by_its_inverse():
    piece = Piece("w", (4, 1), order=(3, 1, 0, 2))
    ours = piece.in_our_order(numbers(4, 1))
    assert ours.flatten().tolist() == [3, 1, 0, 2] and piece.in_stored_order(ours).flatten().tolist() == [0, 1, 2, 3]
    assert torch.equal(Piece("w", (4, 1)).in_stored_order(ours), ours)
