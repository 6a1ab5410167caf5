"""Models of sound, and of series of measurements."""

from __future__ import annotations

from typing import Any

import torch

from .hf_inputs import LENGTH, vocabulary, wave, wave_words, words
from .hf_spec import Spec

_WAVE = {
    "conv_dim": [16, 16, 16],
    "conv_stride": [5, 4, 4],
    "conv_kernel": [10, 4, 4],
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 4,
    "ctc_loss_reduction": "mean",
    "classifier_proj_size": 16,
}


def heard(model_type: str, /, **sizes: Any) -> Spec:
    """Describe a transformer over samples, trained to write what it hears."""
    return Spec(model_type, ("AutoModel", wave), ("AutoModelForCTC", wave_words), {**_WAVE, **sizes})


def _bands(config: Any, rows: int, name: str = "num_mel_bins") -> torch.Tensor:
    return torch.randn(rows, 2 * config.max_source_positions, getattr(config, name))  # (B, T, F)


def _whisper(config: Any, rows: int) -> dict[str, Any]:
    return {"input_features": _bands(config, rows).mT.contiguous(), "decoder_input_ids": words(config, rows, 8)}


def _whisper_labels(config: Any, rows: int) -> dict[str, Any]:
    return {"input_features": _bands(config, rows).mT.contiguous(), "labels": words(config, rows, 8)}


def _speech(config: Any, rows: int) -> dict[str, Any]:
    return {
        "input_features": torch.randn(rows, 40, config.input_feat_per_channel),
        "decoder_input_ids": words(config, rows, 8),
    }


def _speech_labels(config: Any, rows: int) -> dict[str, Any]:
    call = _speech(config, rows)
    return {"input_features": call["input_features"], "labels": call["decoder_input_ids"]}


def _spectrogram(config: Any, rows: int) -> dict[str, Any]:
    return {"input_values": torch.randn(rows, config.max_length, config.num_mel_bins)}


def _spectrogram_class(config: Any, rows: int) -> dict[str, Any]:
    return {**_spectrogram(config, rows), "labels": torch.randint(config.num_labels, (rows,))}


def _sound_words(config: Any, rows: int) -> dict[str, Any]:
    return {**wave(config, rows), "decoder_input_ids": words(config, rows, 8)}


def _sound_labels(config: Any, rows: int) -> dict[str, Any]:
    return {**wave(config, rows), "labels": words(config, rows, 8)}


def _features(config: Any, rows: int) -> dict[str, Any]:
    return {"input_features": torch.randn(rows, 24, config.feature_projection_input_dim)}


def _features_words(config: Any, rows: int) -> dict[str, Any]:
    return {**_features(config, rows), "labels": torch.randint(3, vocabulary(config), (rows, 3))}


def _series(config: Any, rows: int) -> dict[str, Any]:
    return {"past_values": torch.randn(rows, config.context_length, config.num_input_channels)}


def _series_future(config: Any, rows: int) -> dict[str, Any]:
    return {
        **_series(config, rows),
        "future_values": torch.randn(rows, config.prediction_length, config.num_input_channels),
    }


def _probabilistic(config: Any, rows: int) -> dict[str, Any]:
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": torch.randn(rows, past),
        "past_time_features": torch.randn(rows, past, config.num_time_features),
        "past_observed_mask": torch.ones(rows, past),
        "future_values": torch.randn(rows, config.prediction_length),
        "future_time_features": torch.randn(rows, config.prediction_length, config.num_time_features),
    }


def _decisions(config: Any, rows: int) -> dict[str, Any]:
    return {
        "states": torch.randn(rows, LENGTH, config.state_dim),
        "actions": torch.randn(rows, LENGTH, config.act_dim),
        "rewards": torch.randn(rows, LENGTH, 1),
        "returns_to_go": torch.randn(rows, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).repeat(rows, 1),
        "attention_mask": torch.ones(rows, LENGTH),
    }


_FORECAST = {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2, 3], "num_time_features": 2}
_PATCHES = {"context_length": 32, "patch_length": 4, "num_input_channels": 3, "prediction_length": 8}

SPECS = [
    *(heard(name) for name in ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat", "data2vec-audio")),
    heard("wav2vec2-conformer", position_embeddings_type="relative", vocab_size=100),
    heard("sew", squeeze_factor=2),
    heard("sew-d", squeeze_factor=2, position_buckets=8, max_position_embeddings=64),
    Spec(
        "wav2vec2-bert",
        ("AutoModel", _features),
        ("AutoModelForCTC", _features_words),
        {"vocab_size": 100, "feature_projection_input_dim": 20, "conv_depthwise_kernel_size": 3},
    ),
    Spec(
        "whisper",
        ("AutoModel", _whisper),
        ("WhisperForConditionalGeneration", _whisper_labels),
        {"num_mel_bins": 16, "max_source_positions": 20, "suppress_tokens": None, "begin_suppress_tokens": None},
    ),
    Spec(
        "speech_to_text",
        ("AutoModel", _speech),
        ("Speech2TextForConditionalGeneration", _speech_labels),
        {"input_feat_per_channel": 16, "conv_channels": 16},
    ),
    Spec("moonshine", ("AutoModel", _sound_words), ("MoonshineForConditionalGeneration", _sound_labels)),
    Spec(
        "audio-spectrogram-transformer",
        ("AutoModel", _spectrogram),
        ("AutoModelForAudioClassification", _spectrogram_class),
        {"max_length": 40, "num_mel_bins": 24, "patch_size": 8, "frequency_stride": 8, "time_stride": 8},
    ),
    Spec(
        "patchtst", ("AutoModel", _series), ("PatchTSTForPrediction", _series_future), {**_PATCHES, "patch_stride": 4}
    ),
    Spec(
        "patchtsmixer",
        ("AutoModel", _series),
        ("PatchTSMixerForPrediction", _series_future),
        {**_PATCHES, "patch_stride": 4},
    ),
    *(
        Spec(name, ("AutoModel", _probabilistic), (f"{title}ForPrediction", _probabilistic), {**_FORECAST, **extra})
        for name, title, extra in (
            ("time_series_transformer", "TimeSeriesTransformer", {}),
            ("informer", "Informer", {}),
            ("autoformer", "Autoformer", {"moving_average": 5, "label_length": 6}),
        )
    ),
    Spec("decision_transformer", ("AutoModel", _decisions), None, {"state_dim": 5, "act_dim": 3, "max_ep_len": 64}),
]
