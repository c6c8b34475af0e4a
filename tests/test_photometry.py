"""Strong photometry: by the formula and by SciPy's filters, drawn apart from being applied."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter1d
from torch.profiler import profile

from nnunetv2_semicml.training.photometry import Photometry, draw_photometry


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 2, 20, 17), (2, 3, 12, 9, 14)])
def test_images_are_changed_case_by_case_as_the_formulas_say(shape, dtype):
    torch.manual_seed(0)
    images = 7 * torch.randn(shape, dtype=dtype) - 3
    brightness, contrast, blur = [0.6, 1.4, 1.0], [1.5, 0.5, 1.0], [0.0, 0.7, 2.0]
    n = len(images)
    drawn = Photometry(*(torch.tensor(values[:n], dtype=dtype) for values in (brightness, contrast, blur)), 2.0)
    found = drawn.apply(images).numpy()
    for case in range(n):
        for channel in range(shape[1]):
            x = images[case, channel].numpy().astype(float)
            low, high = x.min(), x.max()
            x = np.clip((x - low) / (high - low) * brightness[case], 0, 1)  # on the published scale from 0 to 1
            x = np.clip(x.mean() + contrast[case] * (x - x.mean()), 0, 1) * (high - low) + low
            for axis in range(x.ndim):
                if blur[case]:
                    x = gaussian_filter1d(x, blur[case], axis, mode="nearest", radius=6)
            np.testing.assert_allclose(found[case, channel], x, rtol=1e-4, atol=1e-4)


def test_draw_is_used_again_for_another_image():
    """Of another size and number of channels, such as the patch of another modality."""
    torch.manual_seed(0)
    drawn = draw_photometry(4, torch.device("cpu"), jitter_probability=1.0, blur_probability=1.0)
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(drawn.apply(images), drawn.apply(images))
    other = drawn.apply(torch.cat([images, images], dim=1))
    torch.testing.assert_close(other[:, 1:], drawn.apply(images))
    assert drawn.apply(torch.randn(4, 2, 6, 6, 6)).shape == (4, 2, 6, 6, 6)


def test_draws_have_the_published_distribution():
    torch.manual_seed(0)
    drawn = draw_photometry(20000, torch.device("cpu"))
    for factor in (drawn.brightness, drawn.contrast):
        changed = factor[factor != 1]
        assert len(changed) / 20000 == pytest.approx(0.8, abs=0.02)
        assert changed.min() == pytest.approx(0.5, abs=0.01)
        assert changed.max() == pytest.approx(1.5, abs=0.01)
        assert changed.mean() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drawn.brightness == 1, drawn.contrast == 1)  # both or neither
    blurred = drawn.blur[drawn.blur > 0]
    assert len(blurred) / 20000 == pytest.approx(0.5, abs=0.02)
    assert (blurred.min(), blurred.max()) == (pytest.approx(0.1, abs=0.01), pytest.approx(2.0, abs=0.01))


def test_nothing_drawn_changes_nothing():
    images = torch.randn(3, 2, 8, 8)
    drawn = draw_photometry(3, torch.device("cpu"), jitter_probability=0.0, blur_probability=0.0)
    torch.testing.assert_close(drawn.apply(images), images)


def test_all_is_drawn_and_applied_on_the_device_of_the_images():
    """PyTorch's device without memory refuses operands of the CPU."""
    images = torch.empty(3, 2, 8, 8, device="meta")
    drawn = draw_photometry(3, images.device)
    assert {t.device.type for t in (drawn.brightness, drawn.contrast, drawn.blur)} == {"meta"}
    assert drawn.apply(images).device.type == "meta"


def test_nothing_is_waited_for():
    """On a GPU each of these operations would stop the host until all work is done."""
    images = torch.randn(3, 1, 8, 8)
    with profile() as profiler:
        draw_photometry(3, images.device).apply(images)
    names = {event.key for event in profiler.key_averages()}
    assert "aten::where" in names
    assert not names & {"aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"}
