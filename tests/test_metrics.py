import pytest
import torch

from freqdoor.metrics import bpp_of_bytes, class_counts, class_scores


def test_bits_per_pixel_of_a_file():
    assert bpp_of_bytes(96, torch.zeros(1, 3, 16, 24)) == 8 * 96 / (16 * 24)


def test_nothing_to_average_over_is_none():
    """Two classes; labels from 2 on are void, and what is predicted there counts for nothing."""
    predicted = torch.tensor([[[0, 1, 0, 1]]])

    def scores(*truth: int):
        return class_scores(class_counts(predicted, torch.tensor([[truth]]), 2))

    assert scores(2, 3, 255, 2) == (None, [None, None])
    assert class_scores(torch.zeros(3, 2, dtype=torch.long)) == (None, [None, None])
    miou, accuracy = scores(0, 2, 0, 2)
    assert (miou, accuracy) == (1.0, [1.0, None])
    miou, accuracy = scores(1, 0, 1, 2)
    assert (miou, accuracy) == (0.0, [0.0, 0.0])
    miou, accuracy = scores(0, 0, 0, 2)
    assert miou == pytest.approx(2 / 3)
    assert accuracy == [pytest.approx(2 / 3), None]
