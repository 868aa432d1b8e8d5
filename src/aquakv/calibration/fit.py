"""Fit one codec, layer by layer, in a closed loop: predictors read reconstructions, never exact values."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from aquakv.calibration.group import Group
from aquakv.calibration.history import InputMoments
from aquakv.calibration.metrics import Metric
from aquakv.calibration.plan import (
    SMALLEST_RATIO,
    Plan,
    Spectrum,
    entropy_plan,
    first_model,
    fixed_rate_plan,
    level_options,
    plane_plan,
)
from aquakv.calibration.sensitivity import ProbeErrors, relative_power
from aquakv.calibration.sweep import Split, Sweep
from aquakv.calibration.walk import Batches, lay
from aquakv.codec import (
    AffinePredictor,
    EntropyQuantizer,
    LayerCodec,
    LinearTransform,
    ModelCodec,
    ModelFingerprint,
    OutlierGuard,
    ScalarQuantizer,
    TensorCodec,
)
from aquakv.codec.entropy import EntropyModel, LevelStatistics, spread_class
from aquakv.codec.model import KINDS, build_published_codec
from aquakv.config import CodecConfig
from aquakv.numerics import (
    StreamingMoments,
    allocate_fields,
    fill_bytes,
    reduce_rank,
    ridge,
    shrink_covariance,
    two_stage_klt,
    weighted_klt,
    widths_at,
)

#: Least standard deviation of a coefficient: constant ones must not divide by zero.
_LEAST_DEVIATION = 1e-12

#: What the KLT adds to metrics that have their floor already.
_METRIC_HAS_FLOOR = 1e-9


@dataclass
class CodecFit:
    """A codec in the making.

    Attributes
    ----------
    config, fingerprint
        What is being built, and for which model.
    split
        Fitted and held-out sequences.
    device
        Where the arithmetic runs.
    on_batch
        Called after each batch of each sweep (progress).
    plan
        The water level, if it is known. Without one, every layer's keys and values get the same mean bits,
        and `next_plan` tells the level afterwards.
    probe
        Sequences, and tokens of each, on which errors are kept for `measure_harm`; (0, 0) for none.
    group
        The processes that fit it together.
    meanwhile
        Called where the host has waited or is about to: between batches, and behind solves.
    layers, record
        The finished layers, and their held-out figures.
    probe_errors
        Errors on the probe, layer by layer.
    inputs, hats
        Moments of what later layers' predictors read, and that itself, by layer and kind.
    """

    config: CodecConfig
    fingerprint: ModelFingerprint
    split: Split
    device: torch.device
    on_batch: Callable[[], None]
    plan: Plan = field(default_factory=Plan)
    probe: tuple[int, int] = (0, 0)
    group: Group = field(default_factory=Group)
    meanwhile: Callable[[], None] = lambda: None
    probe_errors: list[ProbeErrors] = field(default_factory=list)
    layers: list[LayerCodec] = field(default_factory=list)
    record: list[dict[str, Any]] = field(default_factory=list)
    hats: dict[str, Batches] = field(default_factory=dict)
    _spectra: list[Spectrum] = field(default_factory=list)
    replayed: int = 0

    #: Sweeps over the batches that `fit_layer` makes, for whoever counts progress.
    SWEEPS = 2

    def __post_init__(self) -> None:
        self.inputs = InputMoments(self.split.fitted, self.device, self.group)
        self._statistics = LevelStatistics.empty(self.device)
        self._model: EntropyModel | None = None
        if self.config.quantizer.kind == "entropy":
            self._model = (self.plan.model or first_model(self.config.quantizer)).to(self.device)

    def begin(
        self, plan: Plan, on_batch: Callable[[], None], meanwhile: Callable[[], None] = lambda: None
    ) -> None:
        """Take the water level that was found since this was made, and whom to tell of progress."""
        self.plan, self.on_batch = plan, on_batch
        self.meanwhile = self.inputs.meanwhile = meanwhile
        if self._model is not None and plan.model is not None:
            self._model = plan.model.to(self.device)

    def fit_layer(
        self,
        keys: Batches,
        values: Batches,
        metrics: Mapping[str, Metric] | None = None,
        importance: Mapping[str, float] | None = None,
    ) -> None:
        """Fit the next layer.

        Parameters
        ----------
        keys, values
            Batches ``[sequences, tokens, num_kv_heads * head_dim]`` without the sink tokens, in any float
            dtype, on any device; keys before rotary embedding.
        metrics
            What attention feels of errors in keys and in values; needed for the KLT and the guard.
        importance
            Harm of errors in keys and in values relative to other layers; equal if None.
        """
        index = len(self.layers)
        codecs: dict[str, TensorCodec] = {}
        probed = ProbeErrors({}, {})
        figures: dict[str, dict[str, float]] = {}
        for kind, targets in zip(KINDS, (keys, values), strict=True):
            names = self._source_names(index, kind)
            weight = 1.0 if importance is None else importance[kind]
            metric = None if metrics is None else metrics[kind]
            codecs[kind], hats, figures[kind] = self._fit_tensor(index, kind, targets, names, metric, weight)
            if self.probe[0] and metric is not None:
                self._keep_errors(probed, kind, targets, hats, codecs[kind].mean, metric)
            if self.config.predictor.kind == "linear":
                self.hats[f"{index}.{kind}"] = hats
                if self._is_read(kind):
                    self.inputs.add(f"{index}.{kind}", hats)
        self._forget(index)
        self.probe_errors.append(probed)
        layer = LayerCodec(codecs["keys"], codecs["values"], self.config.predictor)
        self.layers.append(layer)
        self.record.append(
            {
                "layer": self.fingerprint.compressed_layers[index],
                "importance": dict.fromkeys(KINDS, 1.0) if importance is None else dict(importance),
                **figures,
            }
        )

    def replay_layer(self, keys: Batches, values: Batches) -> None:
        """Reconstruct a layer that is finished as `fit_layer` did, when going on after an interruption.

        Takes what `fit_layer` did. The layers are replayed in order, the finished ones' codecs being in
        ``layers``.
        """
        if self.config.predictor.kind != "linear":
            return
        index = self.replayed
        for kind, targets in zip(KINDS, (keys, values), strict=True):
            codec = getattr(self.layers[index], kind).to(self.device)
            names = self._source_names(index, kind)
            self.hats[f"{index}.{kind}"] = [
                self._encode_batch(codec, targets, number, self._sources(names, number), codec.mean, None)
                for number in range(len(targets))
            ]
        self.replayed += 1
        self._forget(index)

    def next_plan(self) -> Plan:
        """Return the water level that the layers fitted so far call for."""
        if self.config.quantizer.kind == "entropy":
            model = EntropyModel.fit(self._statistics)
            return entropy_plan(self._spectra, model, self.config.allocation.bits)
        return fixed_rate_plan(self._spectra, self.config.allocation, self.config.quantizer)

    def weigh(self, importance: Sequence[Mapping[str, float] | None] | None) -> None:
        """Weigh the spectra of layers that were fitted without knowing their importance."""
        if importance is None:
            return
        weights = [1.0 if layer is None else layer[kind] for layer in importance for kind in KINDS]
        self._spectra = [
            replace(spectrum, weight=spectrum.weight * weight)
            for spectrum, weight in zip(self._spectra, weights, strict=True)
        ]

    def finish(self, calibration: dict[str, Any], fingerprint: ModelFingerprint | None = None) -> ModelCodec:
        """Return the codec, on the CPU, with a calibration record that ends with the figures by layer.

        ``fingerprint`` is the model's whole one, if that was not known at first.
        """
        if fingerprint is not None:
            self.fingerprint = fingerprint
        layers = tuple(layer.to("cpu") for layer in self.layers)
        codec = ModelCodec(self.config, self.fingerprint, layers)
        record = [
            {**figures, **self._bits(layer)} for figures, layer in zip(self.record, codec.layers, strict=True)
        ]
        return replace(codec, calibration={**calibration, "layers": record})

    def _bits(self, layer: LayerCodec) -> dict[str, float]:
        """Return the bits that a layer keeps of a value, of its keys' and of its values'."""
        block = self.config.window.block_tokens
        kept = [part.kept_bytes_per_token(block) for part in (layer.keys, layer.values)]
        keys, values = (8 * size / layer.features for size in kept)
        return {"bits_per_value": (keys + values) / 2, "key_bits": keys, "value_bits": values}

    def _keep_errors(
        self,
        probed: ProbeErrors,
        kind: str,
        targets: Batches,
        hats: Batches,
        mean: Tensor,
        metric: Metric,
    ) -> None:
        """Keep the errors on the probe's tokens, and their size."""
        sequences, tokens = self.probe

        def take(batches: Batches) -> Tensor:
            return torch.cat([batch.to(self.device) for batch in batches])[:sequences, :tokens].float()

        count = -(-sequences // len(targets[0]))
        centred = take(targets[:count]) - mean
        error = take(hats[:count]) - centred
        probed.errors[kind] = error
        probed.relative_power[kind] = relative_power(
            error.flatten(0, 1), centred.flatten(0, 1), metric.matrix
        )

    def _is_read(self, kind: str) -> bool:
        predictor = self.config.predictor
        reads = {*predictor.key_inputs, *predictor.value_inputs}
        return f"previous_{kind}" in reads or (kind == "keys" and "keys" in reads)

    def _source_names(self, index: int, kind: str) -> list[str]:
        """Return the sources that a predictor reads, in the order of `LayerCodec`."""
        predictor = self.config.predictor
        if predictor.kind != "linear":
            return []
        inputs = predictor.key_inputs if kind == "keys" else predictor.value_inputs
        names = []
        if kind == "values" and "keys" in inputs and (index > 0 or predictor.first_layer_values):
            names.append(f"{index}.keys")
        for back in range(1, min(index, predictor.history) + 1):
            names += [f"{index - back}.{n.removeprefix('previous_')}" for n in inputs if n != "keys"]
        return names

    def _forget(self, index: int) -> None:
        """Drop what no later layer reads."""
        wanted = [
            f"{layer}.{kind}"
            for layer in range(index + 1 - self.config.predictor.history, index + 1)
            for kind in KINDS
            if f"previous_{kind}" in (*self.config.predictor.key_inputs, *self.config.predictor.value_inputs)
        ]
        self.hats = {name: hats for name, hats in self.hats.items() if name in wanted}
        self.inputs.keep(wanted)

    def _fit_tensor(
        self,
        index: int,
        kind: str,
        targets: Batches,
        names: list[str],
        metric: Metric | None,
        importance: float,
    ) -> tuple[TensorCodec, Batches, dict[str, float]]:
        moments = self.inputs.regression(names, targets)
        predictor = self._predictor(moments, kind, metric) if names else None
        self.meanwhile()
        mean = moments.mean_y.float()
        offset = torch.zeros_like(mean) if self.config.predictor.kind == "none" else mean
        if self.config.transform.kind == "klt":
            assert metric is not None  # calibrate_many gathers metrics for such configurations
            if predictor is None:
                covariance = moments.scatter_yy / max(moments.count, 1)
            else:
                covariance = self.inputs.residual_covariance(
                    names, targets, predictor.factors, moments.mean_y, moments.count
                )
            size = float((metric.matrix * moments.scatter_yy).sum()) / max(moments.count, 1) / len(offset)
            codec = self._fitted_codec(
                kind, covariance, offset, predictor, metric, importance / max(size, 1e-30)
            )
        else:
            codec = build_published_codec(self.config, self.fingerprint.features, index, offset, predictor)
        codec = codec.to(self.device)
        if self.config.guard.threshold is not None:
            assert metric is not None
            self.meanwhile()
            nothing = torch.ones(1, device=self.device)
            codec = replace(codec, guard=OutlierGuard(metric.roots().float().to(self.device), nothing))
        self.meanwhile()
        sweep = Sweep()
        reconstructions: Batches = []
        for number in range(len(targets)):
            sources = self._sources(names, number)
            reconstructions.append(self._encode_batch(codec, targets, number, sources, mean, sweep))
            self.on_batch()
            self.meanwhile()
        sweep.share(self.group)
        codec = self._completed(codec, sweep)
        return codec, reconstructions, sweep.figures()

    def _sources(self, names: Sequence[str], number: int) -> tuple[Tensor, ...]:
        """Return what a predictor reads of a batch, ``[tokens, features]`` float32 each."""
        return tuple(self._rows(self.hats[name][number]).float() for name in names)

    def _predictor(self, moments: StreamingMoments, kind: str, metric: Metric | None) -> AffinePredictor:
        """Return the predictor of centred targets."""
        weight = ridge(moments, self.config.predictor.ridge).weight
        rank = self.config.predictor.key_rank if kind == "keys" else self.config.predictor.value_rank
        if rank is None:
            factors = (weight.to(torch.bfloat16),)
        else:
            rank = min(rank, *weight.shape)
            factors = reduce_rank(moments, weight, rank, None if metric is None else metric.matrix)
            factors = tuple(factor.to(torch.bfloat16) for factor in factors)
        mean_prediction = moments.mean_x @ _product(factors)
        return AffinePredictor(factors, -mean_prediction.float())

    def _fitted_codec(
        self,
        kind: str,
        covariance: Tensor,
        mean: Tensor,
        predictor: AffinePredictor | None,
        metric: Metric,
        weight: float,
    ) -> TensorCodec:
        """Fit the transform to the residual's covariance and allocate its bits.

        ``weight`` is that of a unit of error in the allocation.
        """
        transform, matrix = self.config.transform, metric.matrix
        scope = transform.scope(kind)
        if transform.shrinkage:
            covariance = shrink_covariance(covariance, transform.shrinkage)
        heads, features = self.fingerprint.num_kv_heads, self.fingerprint.features
        if scope == "two-stage":
            first = min(transform.first_stage, features)
            klt = two_stage_klt(covariance, matrix, heads, first, floor=_METRIC_HAS_FLOOR)
        else:
            blocks = heads if scope == "head" else None
            klt = weighted_klt(covariance, matrix, blocks, floor=_METRIC_HAS_FLOOR)
        spectrum = Spectrum(klt.variances, weight, features, klt.block_of)
        self._spectra.append(spectrum)
        deviations = klt.variances.sqrt().clamp_min(_LEAST_DEVIATION)
        if self.config.quantizer.kind == "scalar":
            widths = self._widths(spectrum, kind)
            kept = torch.argsort(widths.int(), descending=True, stable=True)[: int((widths > 0).sum())]
            quantizer = ScalarQuantizer(
                deviations[kept].float(), widths[kept], self.config.quantizer.arithmetic
            )
        else:
            assert self._model is not None
            step = self._step(spectrum)
            ratio = deviations / step
            kept = torch.arange(max(1, int((ratio > SMALLEST_RATIO).sum())), device=ratio.device)
            quantizer = EntropyQuantizer(
                deviations[kept].float(),
                spread_class(ratio[kept]),
                torch.tensor([step], dtype=torch.float32, device=ratio.device),
                torch.ones(1, device=ratio.device),
                self._model,
                self.config.quantizer.rate_weight,
            )
        linear = LinearTransform(klt.forward[:, kept].contiguous(), klt.inverse[kept].contiguous())
        return TensorCodec(mean, predictor, linear, quantizer)

    def _widths(self, spectrum: Spectrum, kind: str) -> Tensor:
        """Return each coefficient's width, uint8."""
        if self.config.quantizer.arithmetic:
            return self._field_widths(spectrum, kind)
        widths, distortions = level_options(self.config.allocation, self.config.quantizer)
        theta = self.plan.theta
        if theta is None:
            one = replace(spectrum, weight=1.0)
            theta = fixed_rate_plan([one], self.config.allocation, self.config.quantizer).theta
            assert theta is not None
            weighted = spectrum.variances
        else:
            weighted = spectrum.variances * spectrum.weight
        chosen = widths_at(weighted, widths, distortions, theta)
        return fill_bytes(chosen, weighted, widths, distortions)

    def _field_widths(self, spectrum: Spectrum, kind: str) -> Tensor:
        """Return widths that fields share and that fill the planes of the plan."""
        if self.plan.planes is None:
            planes = plane_plan([spectrum], self.config.allocation)[0]
        else:
            planes = self.plan.planes[2 * len(self.layers) + KINDS.index(kind)]
        options = level_options(self.config.allocation, self.config.quantizer)
        widths = torch.zeros(len(spectrum.variances), dtype=torch.uint8, device=spectrum.variances.device)
        chosen = allocate_fields(spectrum.energies, *options, planes)
        for members, width in zip(spectrum.fields, chosen, strict=True):
            widths[members] = width
        return widths

    def _step(self, spectrum: Spectrum) -> float:
        if self.plan.step is not None:
            return self.plan.step / spectrum.weight**0.5
        assert self._model is not None
        one = replace(spectrum, weight=1.0)
        step = entropy_plan([one], self._model, self.config.allocation.bits).step
        assert step is not None
        return step

    def _encode_batch(
        self,
        codec: TensorCodec,
        targets: Batches,
        number: int,
        sources: tuple[Tensor, ...],
        mean: Tensor,
        sweep: Sweep | None,
    ) -> Tensor:
        """Encode a batch, gather figures, and return the reconstruction in the batch's shape and dtype."""
        batch = targets[number]
        centred = self._rows(batch).float() - codec.mean
        prediction = codec.predict(centred, sources)
        residual = centred - prediction
        coefficients = codec.transform.forward(residual)
        codes, dequantized = codec.quantizer.quantize(coefficients)
        hat = codec.transform.inverse_add(dequantized, prediction)
        if sweep is not None:
            first = self.split.fitted[number] * batch.shape[1]
            sweep.count_errors(codec, centred, residual, hat, mean, first)
            if isinstance(codec.quantizer, EntropyQuantizer):
                codec.quantizer.count(codes.head(first), coefficients[:first], self._statistics)
                sweep.code_bits += codec.quantizer.code_bits(codes.tail(first))
        return lay(hat.view(batch.shape).to(batch.dtype), batch.device)

    def _completed(self, codec: TensorCodec, sweep: Sweep) -> TensorCodec:
        """Return the codec with what only the sweep could tell."""
        if isinstance(codec.quantizer, EntropyQuantizer):
            bits = sweep.code_bits / max(sweep.held_out_tokens, 1)
            rate = torch.full((1,), max(bits, 1e-3), device=self.device)
            codec = replace(codec, quantizer=replace(codec.quantizer, rate_bits=rate))
        if codec.guard is not None and self.config.guard.threshold is not None:
            limit = self.config.guard.threshold * sweep.weighted_error / max(sweep.fitted_tokens, 1)
            limit = torch.full((1,), max(limit, 1e-30), device=self.device)
            codec = replace(codec, guard=replace(codec.guard, limit=limit))
        return codec

    def _rows(self, batch: Tensor) -> Tensor:
        return batch.to(self.device).flatten(0, 1)


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """Return the map that factors make, float64."""
    first = factors[0].double()
    return first if len(factors) == 1 else first @ factors[1].double()
