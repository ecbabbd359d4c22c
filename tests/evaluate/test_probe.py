"""Tests of the three measures against known answers, and of `mimae probe` from a run's directory to its table."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize  # type: ignore[import-untyped]
from sklearn.linear_model import LogisticRegression as Sklearn  # type: ignore[import-untyped]
from torch import Tensor
from torch.nn import functional as F

from mimae.config.load import load_recipe
from mimae.config.printing import as_yaml
from mimae.data.loading.order import Share
from mimae.data.settings import DataSettings
from mimae.data.sources.base import Source
from mimae.data.sources.open import open_source
from mimae.errors import CheckpointError, UserError
from mimae.evaluate import command, linear, probe
from mimae.evaluate.features import extract, pixels
from mimae.evaluate.knn import knn_accuracy, nearest_neighbours
from mimae.evaluate.linear import Linear, LogisticRegression, few_label_probe, linear_probe
from mimae.evaluate.samples import balanced_subset, ranks_in_class, shared_labels, standardise
from mimae.train.tasks.pretrain import pretrain


def blobs(n: int, classes: int, width: int, distance: float, seed: int) -> tuple[Tensor, Tensor]:
    """Return features around one corner per class, at `distance` deviations from the origin."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    corners = F.one_hot(labels, width).float() * distance
    return corners + torch.randn(n, width, generator=generator), labels


# Choosing samples


def test_ranks_number_every_class_from_zero_in_an_order_of_the_seed() -> None:
    labels = torch.tensor([2, 0, 0, 2, 2, 0, 1])  # class sizes 3, 1, 3
    ranks = ranks_in_class(labels, seed=0)
    for label, size in ((0, 3), (1, 1), (2, 3)):
        assert sorted(ranks[labels == label].tolist()) == list(range(size))
    assert len({tuple(ranks_in_class(labels, seed).tolist()) for seed in range(20)}) > 5


def test_a_balanced_subset_differs_by_one_between_classes_and_takes_all_of_a_rare_one() -> None:
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 2)
    ids = balanced_subset(labels, 15, seed=3)
    assert torch.equal(ids, ids.unique())
    counts = torch.bincount(labels[ids]).tolist()
    assert counts[2] == 2 and sorted(counts[:2]) == [6, 7]
    assert torch.equal(balanced_subset(labels, 100, seed=3), torch.arange(82))


# The measures


def fit(features: Tensor, labels: Tensor, classes: int, penalty: float) -> Linear:
    """Fit one regression on all samples."""
    whole = LogisticRegression(features[None], labels[None], torch.ones(1, len(labels)), classes)
    return whole.fit(torch.tensor([penalty]))


def test_the_fit_is_the_minimum_of_the_penalised_cross_entropy() -> None:
    """The fit is compared with scipy's solver in float64, on correlated columns; two are equal and one is large."""
    features, labels = blobs(120, 3, 7, 1.5, seed=1)
    features[:, 6] = features[:, 5]
    features[:, 4] = features[:, 3] * 100
    penalty = 1e-2

    def loss(weight: Tensor, bias: Tensor) -> Tensor:
        entropy = F.cross_entropy(features.double() @ weight + bias, labels)
        return entropy + penalty / 2 * weight.square().sum()

    def loss_and_gradient(flat: np.ndarray) -> tuple[float, np.ndarray]:
        variables = torch.from_numpy(flat.copy()).view(8, 3).requires_grad_()
        value = loss(variables[:7], variables[7])
        value.backward()
        return value.item(), variables.grad.flatten().numpy()

    optimum = minimize(loss_and_gradient, np.zeros(24), jac=True, method="BFGS", options={"gtol": 1e-9}).fun
    fitted = fit(features, labels, 3, penalty)
    assert optimum <= loss(fitted.weight[0].double(), fitted.bias[0].double()).item() < optimum + 10 * linear.TOLERANCE
    assert optimum < 0.8  # log 3 = 1.1 at zero


def test_problems_that_are_fitted_together_do_not_touch_each_other() -> None:
    """Problems have different features, weights and penalties. A sample of weight 0 has no effect."""
    (one, labels), (two, _) = blobs(60, 3, 5, 2.0, seed=0), blobs(60, 3, 5, 1.0, seed=1)
    weights = torch.ones(2, 60)
    weights[1, 40:] = 0
    both = LogisticRegression(torch.stack([one, two]), torch.stack([labels, labels]), weights, 3)
    fitted = both.fit(torch.tensor([1.0, 0.1]))
    for i, alone in enumerate((fit(one, labels, 3, 1.0), fit(two[:40], labels[:40], 3, 0.1))):
        # Each problem ends within the tolerance of its optimum, but takes another path.
        torch.testing.assert_close(fitted.weight[i], alone.weight[0], atol=0.02, rtol=0)


def graded(n: int, width: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return standardised, correlated features of 10 overlapping classes; the scales of directions differ by 30."""
    rows, shape = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 10
    centres = torch.randn(10, width, generator=shape) * 3 / width**0.5
    mix = torch.randn(width, width, generator=shape) * 0.3 / width**0.5 + torch.diag(torch.logspace(0, -1.5, width))
    (features,) = standardise((centres[labels] + torch.randn(n, width, generator=rows)) @ mix)
    return features, labels


def by_sklearn(features: Tensor, labels: Tensor, penalty: float) -> Linear:
    """Return the minimum found by scikit-learn in float64; its C weights the sum of the losses and not the penalty."""
    model = Sklearn(C=1 / (len(labels) * penalty), tol=1e-8, max_iter=10_000)
    model.fit(features.double().numpy(), labels.numpy())
    return Linear(torch.from_numpy(model.coef_.T), torch.from_numpy(model.intercept_))


def loss_of(fitted: Linear, features: Tensor, labels: Tensor, penalty: float) -> float:
    """Return the penalised mean cross-entropy in float64."""
    weight, bias = fitted.weight.double(), fitted.bias.double()
    return (F.cross_entropy(features.double() @ weight + bias, labels) + penalty / 2 * weight.square().sum()).item()


@pytest.mark.parametrize(("width", "labelled"), [(96, None), (96, 200), (400, 200)], ids=["all", "few", "few and wide"])
def test_every_fit_reaches_the_minimum_of_scikit_learn(width: int, labelled: int | None) -> None:
    """Fits with all penalties run together, and end at different times.

    There are all 3,000 labels, or 200, which are fewer than the features of the last case.
    """
    train, labels = graded(3000, width, seed=1)
    ids = balanced_subset(labels, labelled or len(labels), seed=3)
    features, labels, penalties = train[ids], labels[ids], linear.PENALTIES
    many = len(penalties)
    together = LogisticRegression(
        features.expand(many, -1, -1), labels.expand(many, -1), torch.ones(many, len(ids)), classes=10
    ).fit(torch.tensor(penalties))
    for weight, bias, penalty in zip(*together, penalties, strict=True):
        least = loss_of(by_sklearn(features, labels, penalty), features, labels, penalty)
        assert loss_of(Linear(weight, bias), features, labels, penalty) < least + 10 * linear.TOLERANCE, penalty


def accuracy_by_sklearn(train: Tensor, labels: Tensor, test: Tensor, test_labels: Tensor, penalty: float) -> float:
    theirs = by_sklearn(train, labels, penalty)
    return ((test.double() @ theirs.weight + theirs.bias).argmax(1) == test_labels).double().mean().item()


@pytest.mark.slow
@pytest.mark.parametrize("width", [96, 400])
def test_every_draw_scores_as_with_scikit_learn(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is compared at each penalty, from the choice of samples to the accuracy.

    There are more features (400) than labels. A fit that stops too early changes up to 30 of 1,000 predictions.
    """
    train, labels = graded(3000, width, seed=1)
    test, test_labels = graded(1000, width, seed=2)
    draws = [balanced_subset(labels, 200, draw) for draw in range(5)]
    for penalty in linear.PENALTIES:
        monkeypatch.setattr(linear, "PENALTIES", (penalty,))
        few = few_label_probe(train, labels, test, test_labels, 10)
        theirs = [accuracy_by_sklearn(train[ids], labels[ids], test, test_labels, penalty) for ids in draws]
        assert few == pytest.approx(theirs, abs=0.015), penalty


@pytest.mark.slow
def test_all_labels_score_as_with_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    train, labels = graded(3000, 96, seed=1)
    test, test_labels = graded(1000, 96, seed=2)
    for penalty in linear.PENALTIES:
        monkeypatch.setattr(linear, "PENALTIES", (penalty,))
        ours, _ = linear_probe(train, labels, test, test_labels, 10)
        assert ours == pytest.approx(accuracy_by_sklearn(train, labels, test, test_labels, penalty), abs=0.015), penalty


def test_a_problem_without_information_leaves_the_others_alone() -> None:
    """Its gradient is only rounding and its curvature is 0, so their ratio is not finite."""
    features, labels = blobs(60, 3, 5, 2.0, seed=0)
    both = torch.stack([torch.zeros_like(features), features])
    fitted = LogisticRegression(both, labels.expand(2, -1), torch.ones(2, 60), 3).fit(torch.tensor([1e-5, 1e-2]))
    assert not fitted.weight[0].any() and fitted.bias[0].abs().max() < 1e-6
    alone = fit(features, labels, 3, 1e-2)
    torch.testing.assert_close(fitted.weight[1], alone.weight[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("features", [torch.zeros(40, 5), torch.ones(40, 1).expand(40, 5)])
def test_features_without_information_are_fitted_too(features: Tensor) -> None:
    """A collapsed encoder gives features without variance, with a singular Gram matrix."""
    labels = torch.arange(40) % 4
    (plain,) = standardise(features)
    assert plain.abs().max() < 1e-5
    assert fit(plain, labels, 4, 1e-5).right(plain[None], labels[None]).sum() == 10


def test_separable_classes_are_told_apart_by_every_measure() -> None:
    train, train_labels = blobs(400, 4, 12, 12.0, seed=0)
    test, test_labels = blobs(100, 4, 12, 12.0, seed=1)
    scores = probe.measure(train, train_labels, test, test_labels, 4)
    assert (scores["linear"], scores["few_labels"], scores["knn"]) == (1.0, 1.0, 1.0)


def test_noise_scores_what_guessing_does() -> None:
    """The measures must not leak: features without information about four classes score a quarter."""
    train, train_labels = blobs(800, 4, 12, 0.0, seed=0)
    test, test_labels = blobs(1000, 4, 12, 0.0, seed=1)
    scores = probe.measure(train, train_labels, test, test_labels, 4)
    for measure in probe.MEASURES:
        assert abs(scores[measure] - 0.25) < 0.06, measure  # 4 deviations of 1,000 guesses


def test_more_labels_help_and_200_are_all_that_the_few_label_probe_sees() -> None:
    train, train_labels = blobs(2000, 5, 40, 1.5, seed=0)
    test, test_labels = blobs(1000, 5, 40, 1.5, seed=1)
    few = few_label_probe(train, train_labels, test, test_labels, 5)
    linear, _ = linear_probe(train, train_labels, test, test_labels, 5)
    assert len(set(few)) > 1 and max(few) < linear
    seen = torch.cat([balanced_subset(train_labels, 200, seed=draw) for draw in range(5)])
    spoiled = torch.full_like(train, 1e3)
    spoiled[seen] = train[seen]
    assert few_label_probe(spoiled, train_labels, test, test_labels, 5) == few


def test_few_labels_with_more_features_than_samples_keeps_the_unreduced_optimum() -> None:
    """With 300 features and 200 samples the problem is solved in the span of the samples."""
    train, labels = blobs(200, 4, 300, 3.0, seed=0)
    test, test_labels = blobs(500, 4, 300, 3.0, seed=1)
    accuracies = few_label_probe(train, labels, test, test_labels, 4)
    whole = [
        fit(train, labels, 4, penalty).right(test[None], test_labels[None]).float().mean().item()
        for penalty in linear.PENALTIES
    ]
    assert all(min(abs(accuracy - other) for other in whole) <= 0.01 for accuracy in accuracies)


def fine_difference(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """The class is the small difference of two columns: a strong penalty hides it, a weak one finds it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 2
    common = torch.randn(n, generator=generator)
    other = common + 0.1 * labels + 0.03 * torch.randn(n, generator=generator)
    return torch.stack([common, other], 1), labels


def test_the_test_set_has_no_part_in_choosing_the_penalty() -> None:
    train, train_labels = fine_difference(400, seed=0)
    test, test_labels = fine_difference(200, seed=1)
    accuracy, penalty = linear_probe(train, train_labels, test, test_labels, 2)
    assert accuracy > 0.9 and penalty < 1e-2
    mirrored, other = linear_probe(train, train_labels, test, 1 - test_labels, 2)
    assert mirrored == pytest.approx(1 - accuracy) and other == penalty
    assert linear_probe(train, train_labels, test * 0, test_labels, 2)[1] == penalty
    # Training labels that the difference says nothing about move it.
    assert linear_probe(train, (train[:, 0] > 0).long(), test, test_labels, 2)[1] != penalty


def test_nearest_neighbours_by_hand() -> None:
    """There are two classes in the plane, and lengths do not matter.

    The query (1, 0) has one neighbour of class 0 at cosine 1 and two of class 1 at cosine 0.8. The votes are 1 and
    2 exp(-0.2 / 0.07) = 0.11, so the nearest one wins.
    """
    train = torch.tensor([[0.1, 0.0], [8.0, 6.0], [8.0, -6.0], [-1.0, 0.0]])
    labels = torch.tensor([0, 1, 1, 1])
    queries = torch.tensor([[5.0, 0.0], [-2.0, 0.1], [0.9, 0.7]])
    answers = torch.tensor([0, 1, 1])
    assert nearest_neighbours(train, labels, queries, answers, 2) == 1.0
    assert nearest_neighbours(train, labels, queries, torch.tensor([1, 1, 1]), 2) == pytest.approx(2 / 3)


def test_only_twenty_neighbours_vote() -> None:
    """If all voted, 21 samples of class 1 would outvote 20 of class 0, which are slightly nearer."""
    near, far = torch.tensor([[1.0, 0.0]]).repeat(20, 1), torch.tensor([[1.0, 0.01]]).repeat(21, 1)
    labels = torch.tensor([0] * 20 + [1] * 21)
    query, answer = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    assert nearest_neighbours(torch.cat([near, far]), labels, query, answer, 2) == 1.0


def test_standardising_takes_mean_and_deviation_of_the_training_set_alone() -> None:
    train, test = torch.tensor([[0.0, 5.0], [2.0, 5.0]]), torch.tensor([[4.0, 6.0]])
    scaled_train, scaled_test = standardise(train, test)
    assert torch.equal(scaled_train, torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert torch.equal(scaled_test, torch.tensor([[3.0, 1.0]]))


# Labels and images


@dataclass
class Labelled:
    """A source that has only labels."""

    name: str
    labels: np.ndarray | None
    classes: list[str] | None = None
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    @property
    def fingerprint(self) -> str:
        return self.name

    @property
    def shares(self) -> tuple[Share, ...]:
        raise AssertionError("labels are not drawn from")

    def path(self, i: int) -> str:
        raise AssertionError("labels need no file")

    def read(self, i: int) -> bytes:
        raise AssertionError("labels need no file")


def test_classes_go_by_name_where_folders_have_them() -> None:
    """If a test folder lacks a class, the numbers of its other classes differ."""
    train = Labelled("train", np.array([0, 1, 2, 2]), ["cat", "dog", "fox"])
    test = Labelled("test", np.array([0, 1]), ["dog", "fox"])
    train_labels, test_labels, classes = shared_labels(train, test)
    assert (train_labels.tolist(), test_labels.tolist(), classes) == ([0, 1, 2, 2], [1, 2], 3)
    by_number = shared_labels(train, Labelled("list", np.array([2, 0])))
    assert (by_number[1].tolist(), by_number[2]) == ([2, 0], 3)


def test_what_the_labels_do_not_allow_is_told() -> None:
    train = Labelled("train", np.array([0, 1]), ["cat", "dog"])
    with pytest.raises(UserError, match=r"plain has no labels.*separate folder"):
        shared_labels(train, Labelled("plain", None))
    with pytest.raises(UserError, match=r"test holds 1 classes that the training set train lacks, emu"):
        shared_labels(train, Labelled("test", np.array([0, 1]), ["cat", "emu"]))


def draw(folder: Path, per_class: int, seed: int) -> Path:
    """Write three classes of 8 x 8 images: red, green or blue, with noise."""
    noise = np.random.default_rng(seed)
    for channel, name in enumerate(("red", "green", "blue")):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            image = noise.integers(0, 100, (8, 8, 3))
            image[..., channel] += 120
            Image.fromarray(image.astype(np.uint8)).save(folder / name / f"{i}.png")
    return folder


def opened(folder: Path) -> Source:
    return open_source(str(folder))


def test_pixels_of_large_images_are_averaged_to_32() -> None:
    images = torch.randint(0, 256, (2, 64, 96, 3), dtype=torch.uint8)
    features = pixels(images).view(2, 3, 32, 32)
    assert features[1, 2, 0, 1].item() == pytest.approx(images[1, :2, 3:6, 2].float().mean().item())
    assert torch.equal(pixels(images[:, :8, :8]), images[:, :8, :8].permute(0, 3, 1, 2).flatten(1).float())


def test_an_unreadable_image_has_no_features(tmp_path: Path) -> None:
    folder = draw(tmp_path / "train", 3, seed=0)
    (folder / "green" / "1.png").write_bytes(b"no image")
    source = opened(folder)
    data = DataSettings(path=str(folder), image_size=8, workers=0)
    features, ids = extract({"pixels": pixels}, data, source, torch.arange(9), torch.device("cpu"))
    bad = next(i for i in range(9) if source.path(i).endswith("green/1.png"))
    assert ids.tolist() == [i for i in range(9) if i != bad]
    assert features["pixels"].shape == (8, 192)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps on three classes, whose colours even untrained features distinguish."""
    folder = tmp_path_factory.mktemp("probe")
    draw(folder / "train", 30, seed=0)
    draw(folder / "test", 8, seed=1)
    recipe = load_recipe(
        {
            "precision": "fp32",
            "run": {"dir": str(folder / "run")},
            "data": {
                "path": str(folder / "train"), "val_path": str(folder / "test"),
                "image_size": 8, "workers": 0, "loader": "torch",
            },
            "model": {"patch_size": 2, "width": 16, "depth": 1, "heads": 2},
            "decoder": {"width": 8, "depth": 1, "heads": 1},
            "schedule": {"batch_size": 8, "epochs": 1, "warmup_epochs": 0, "max_steps": 2},
            "checkpoint": {"every_steps": 1, "background": False},
            "telemetry": {"tensorboard": False, "images_every_epochs": 0},
        }
    ).recipe  # fmt: skip
    assert pretrain(recipe).finished
    return Path(recipe.run.dir)


def test_probe_of_a_run_prints_a_table_and_writes_it(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command.probe(run)
    printed = capsys.readouterr().out
    written = json.loads((run / "probe.json").read_text())
    assert list(written["features"]) == ["raw pixels", "random encoder", "this run"]
    assert (written["train_images"], written["test_images"], written["classes"]) == (90, 24, 3)
    for name, scores in written["features"].items():
        assert name in printed
        for measure in probe.MEASURES:
            assert f"{scores[measure]:.3f}" in printed
            assert 0.9 <= scores[measure] <= 1
    again = probe.probe(run)
    assert again["features"] == written["features"]


def test_one_checkpoint_is_probed_by_its_path_and_has_a_file_of_its_own(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let a sum of the features stand for the accuracies, which two steps of training do not change."""
    monkeypatch.setattr(probe, "measure", lambda train, *_: dict.fromkeys(probe.MEASURES, train.double().sum().item()))
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "probe.json").unlink(missing_ok=True)
    earlier = copied / "checkpoints" / "step-00000001"
    (tmp_path / "link").symlink_to(earlier)
    sums = set()
    for path in (earlier, tmp_path / "link", earlier / ".", Path("step-00000001"), Path(".")):
        monkeypatch.chdir({"step-00000001": earlier.parent, ".": earlier}.get(str(path), tmp_path))
        command.probe(path, baselines=False)
        written = json.loads((copied / "probe-step-00000001.json").read_text())
        (copied / "probe-step-00000001.json").unlink()
        assert written["checkpoint"] == "step-00000001"
        sums.add(written["features"]["this run"]["linear"])
    whole = probe.probe(copied, baselines=False)
    assert whole["checkpoint"] == "step-00000002" and len(sums) == 1
    assert whole["features"]["this run"]["linear"] not in sums
    assert not list(copied.rglob("probe*")), "neither the run nor a checkpoint holds another file"
    with pytest.raises(CheckpointError, match=r"neither a run directory nor a checkpoint of one"):
        command.probe(tmp_path)


def test_a_probe_whose_file_cannot_be_written_prints_its_table(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = dict.fromkeys((*probe.MEASURES, "penalty", "few_labels_std"), 0.5)
    counts = {"train_images": 9, "test_images": 3, "unreadable_images": 0, "classes": 3, "few_labels": 200}
    monkeypatch.setattr(probe, "probe", lambda *_: counts | {"features": {"this run": scores}})
    other = tmp_path / "other"
    (other / "probe.json").mkdir(parents=True)
    (other / "config.yaml").touch()
    with pytest.raises(UserError, match=r"probe\.json cannot be written: .*; --out FILE names another file"):
        command.probe(other)
    assert "0.500" in capsys.readouterr().out
    command.probe(other, out=tmp_path / "here.json")
    assert json.loads((tmp_path / "here.json").read_text())["classes"] == 3
    with pytest.raises(UserError, match=r"missing/x\.json cannot be written: No such file or directory$"):
        command.probe(other, out=tmp_path / "missing" / "x.json")
    assert capsys.readouterr().out.count("0.500") == 6


def test_the_random_encoder_is_not_the_run(run: Path) -> None:
    """The features of the two rows have to differ, and those of the run have to be the checkpoint's."""
    recipe = load_recipe(run / "config.yaml").recipe
    begun, ended = probe.build(recipe).encoder.state_dict(), probe.load_encoder(run).state_dict()
    assert any(not torch.equal(begun[name], ended[name]) for name in begun)


def test_a_run_without_test_images_or_labels_is_told(run: Path, tmp_path: Path) -> None:
    recipe = load_recipe(run / "config.yaml").recipe
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "checkpoints").symlink_to(run / "checkpoints")
    (copied / "latest").write_text((run / "latest").read_text())
    without = recipe.model_copy(update={"data": recipe.data.model_copy(update={"val_path": None})})
    (copied / "config.yaml").write_text(as_yaml(without))
    with pytest.raises(UserError, match=r"data.val_path is null.*--test PATH"):
        probe.probe(copied)
    assert probe.probe(copied, test=str(recipe.data.val_path))["test_images"] == 24
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("RGB", (8, 8)).save(flat / "one.png")
    with pytest.raises(UserError, match=r"flat has no labels"):
        probe.probe(copied, test=str(flat))
    with pytest.raises(UserError, match=r"a probe needs 5 for each class, 15"):
        probe.probe(run, images=14)


def test_the_online_probe_looks_at_no_more_images_than_asked(run: Path) -> None:
    recipe = load_recipe(run / "config.yaml").recipe
    encoder = probe.load_encoder(run)
    seen = []
    whole = encoder.features
    encoder.features = lambda images: seen.append(len(images)) or whole(images)  # type: ignore
    train, test = opened(Path(recipe.data.path)), opened(Path(str(recipe.data.val_path)))
    assert knn_accuracy(encoder, recipe.data, train, test, limit=12) >= 0.9
    assert sum(seen) == 24
