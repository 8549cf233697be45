"""The package as its users call it, which `mypy --strict` accepts.

Nobody runs it. What a call returns is what `assert_type` says.
"""

import pathlib
import re
from collections.abc import Mapping
from typing import Any
from typing import assert_type

import keras
import keras_hub
import matplotlib.figure
import numpy as np

import keras_fvae
from keras_fvae.analysis.groups import GroupAccuracy
from keras_fvae.analysis.memory import MemoryPerDevice
from keras_fvae.analysis.probes import LayerLatents
from keras_fvae.analysis.probes import Probe
from keras_fvae.analysis.probes import Probes
from keras_fvae.layers.config import AdapterConfig
from keras_fvae.methods.fvae.fvae import FVAEOutput
from keras_fvae.model.summary import AdapterSummary
from keras_fvae.model.summary import LayerSummary


def make_model() -> keras.Model:
    layers = [keras.layers.Dense(8, name="query"), keras.layers.Dense(3)]
    return keras.Sequential([keras.Input((4,)), *layers])


def enable(model: keras.Model, config: AdapterConfig) -> None:
    summary = keras_fvae.enable_fvae_lora(model)
    assert_type(summary, AdapterSummary)
    keras_fvae.enable_fvae_lora(
        model,
        8,
        ["query", re.compile("value$")],
        trainable_layer_names="head",
        exclude_layer_names=(lambda layer: layer.units > 8,),
        dropout=0.0,
    )
    keras_fvae.enable_fvae_lora(
        model, config=keras_fvae.FVAELoRAConfig.from_paper(rank=8)
    )
    assert_type(keras_fvae.enable_adapter(model, config), AdapterSummary)
    keras_fvae.enable_adapter(model, config, "all-linear")
    keras_fvae.enable_adapter(model, config, {"query", "value"})
    keras_fvae.enable_adapter(model, config, lambda layer: layer.built)
    ranks = {"query": 4, "value": 8}
    keras_fvae.enable_adapter(model, config, ranks)
    keras_fvae.enable_adapter(
        model,
        config,
        {
            "query": {"rank": 4, "alpha": 8.0},
            re.compile("value"): keras_fvae.DoRAConfig(8),
            lambda layer: layer.built: 2,
        },
    )
    names: list[str] = [layer.name for layer in model.layers]
    keras_fvae.enable_adapter(model, config, names, trainable_layer_names=names)


def look_at(summary: AdapterSummary) -> None:
    assert_type(summary.layers, tuple[LayerSummary, ...])
    assert_type(summary.layer_paths, tuple[str, ...])
    assert_type(summary.trainable_parameters, int)
    layer = summary.layers[0]
    assert_type(layer.config, AdapterConfig)
    assert_type(layer.config.scale, float)
    assert_type(layer.method, str)
    assert_type(layer.health, str | None)


def save_and_load(model: keras.Model, folder: pathlib.Path) -> None:
    keras_fvae.save_adapter(model, "task.safetensors")
    keras_fvae.save_adapter(model, folder / "task.safetensors", "inference")
    state = keras_fvae.read_adapter(folder / "task.safetensors")
    assert_type(state, keras_fvae.AdapterState)
    assert_type(state.arrays, Mapping[str, np.ndarray])
    assert_type(state.configs, dict[str, AdapterConfig])
    assert_type(state.is_finalized("query"), bool)
    state.save(folder / "copy.safetensors")
    assert_type(keras_fvae.get_adapter(model), keras_fvae.AdapterState)
    keras_fvae.set_adapter(model, state, replace=True, only="adapter", seed=1)
    summary = keras_fvae.load_adapter(model, "task.safetensors", strict=True)
    assert_type(summary, AdapterSummary)
    assert_type(keras_fvae.adapter_summary(model), AdapterSummary)
    keras_fvae.save_peft_adapter(model, folder, transformers_version=5)
    assert_type(keras_fvae.load_peft_adapter(model, folder), AdapterSummary)
    keras_fvae.upload_adapter(model, "hf://user/task", base_model="hf://base")
    path = keras_fvae.download_adapter("hf://user/task")
    assert_type(path, pathlib.Path)
    keras_fvae.load_adapter(model, path)


def go_to_inference(model: keras.Model, x: np.ndarray) -> None:
    with keras_fvae.adapter_disabled(model):
        model.predict(x)
    with keras_fvae.adapter_scale(model, 0.5):
        model.predict(x)
    with keras_fvae.adapter_sampling(model, seed=1):
        model.predict(x)
    keras_fvae.predict_samples(model, x, 4, batch_size=8)
    keras_fvae.finalize_adapter(model)
    keras_fvae.merge_adapter(model)
    keras_fvae.remove_adapter(model)


def configure() -> list[AdapterConfig]:
    config = keras_fvae.FVAELoRAConfig(
        8,
        16.0,
        encoder_units=(),
        objective="beta_vae2lat",
        gamma_weight=(0.1, 0.2),
        seed=0,
    )
    assert_type(config.rank, int)
    assert_type(config.alpha, float | None)
    assert_type(config.gamma_weights, tuple[float, float])
    assert_type(config.hidden_units, tuple[int, ...])
    assert_type(config.for_layer(1), keras_fvae.FVAELoRAConfig)
    assert_type(config.scaled(2.0), keras_fvae.FVAELoRAConfig)
    assert_type(config.get_config(), dict[str, Any])
    published = keras_fvae.FVAELoRAConfig.from_paper(dropout=0.0)
    assert_type(published, keras_fvae.FVAELoRAConfig)
    return [
        config,
        keras_fvae.LoRAConfig(4, 8, dropout=0.1),
        keras_fvae.RSLoRAConfig(4),
        keras_fvae.FFALoRAConfig(4),
        keras_fvae.PiSSAConfig(4),
        keras_fvae.OLoRAConfig(4),
        keras_fvae.DoRAConfig(4, gradient_through_norm=True),
        keras_fvae.HiRAConfig(4),
        keras_fvae.AdaLoRAConfig(4, target_rank=2),
        keras_fvae.DropLoRAConfig(4, dropout=0.5),
        keras_fvae.MoELoRAConfig(4, num_experts=4, top_k=2),
        keras_fvae.BeamLoRAConfig(4, temperature=0.1),
        keras_fvae.FlatLoRAConfig(4, rho=0.1),
        keras_fvae.SRLoRAConfig(4),
        keras_fvae.OPLoRAConfig(4, mean_squares=True),
    ]


def make_layers(x: np.ndarray) -> list[keras.layers.Layer]:
    config = keras_fvae.LoRAConfig(4)
    dense = keras_fvae.AdaptedDense(8, config, activation="relu")
    assert_type(dense.config, AdapterConfig)
    assert_type(dense.adapter.num_ranks, int)
    fvae = keras_fvae.FVAE(keras_fvae.FVAELoRAConfig(4))
    fvae.build((None, 8))
    assert_type(fvae.call(x), FVAEOutput)
    weights = fvae.get_reference_weights()
    assert_type(weights, dict[str, np.ndarray])
    fvae.set_reference_weights(weights)
    assert_type(fvae.decoder_std, np.ndarray)
    return [
        dense,
        fvae,
        keras_fvae.AdaptedEinsumDense("btd,dk->btk", (None, 8), config),
        keras_fvae.AdaptedConv1D(8, 3, config),
        keras_fvae.AdaptedConv2D(8, (3, 3), config, padding="same"),
        keras_fvae.AdaptedConv3D(8, 3, config),
        keras_fvae.FVAELoRADense(8, rank=4),
        keras_fvae.FVAELoRAEinsumDense("btd,dk->btk", (None, 8), rank=4),
    ]


def train(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    schedule = keras.optimizers.schedules.CosineDecay(1e-3, 100)
    others = keras.optimizers.AdamW(1e-3)
    optimizers: list[keras.optimizers.Optimizer] = [
        keras_fvae.optimizers.LoRARITE(schedule, others, weight_decay=0.1),
        keras_fvae.optimizers.OPLoRA(1e-3, momentum=0.9),
        keras_fvae.optimizers.RiemannianPreconditioning(
            others, global_clipnorm=1.0
        ),
    ]
    groups = ["day", "night"]
    checkpoint = keras_fvae.AdapterCheckpoint(
        pathlib.Path("best.safetensors"), "val_acc", True, mode="max"
    )
    monitor = keras_fvae.FVAELoRAMonitor(per_layer=True)
    allocator = keras_fvae.AdaLoRAAllocator(final_steps=10)
    callbacks: list[keras.callbacks.Callback] = [
        checkpoint,
        monitor,
        allocator,
        keras_fvae.BeamLoRAPruner(interval=10),
        keras_fvae.FlatLoRASchedule(),
        keras_fvae.FVAELoRASchedule(
            elbo_weight=lambda step: 1e-3 * min(1.0, step / 100),
            kl_weight=schedule,
            gamma_weight=lambda step: (0.1, 0.1 * step),
        ),
        keras_fvae.SRLoRARestarter(10),
        keras_fvae.WorstGroupAccuracy(x, y, groups, batch_size=8),
    ]
    model.compile(optimizers[0], "mse")
    history = model.fit(x, y, callbacks=callbacks)
    assert_type(checkpoint.best, float | None)
    assert_type(monitor.health, dict[str, str])
    assert_type(allocator.history, list[dict[str, int]])
    keras_fvae.plots.plot_training(history)
    keras_fvae.plots.plot_ranks(allocator.history)


def analyze(model: keras.Model, x: np.ndarray, y: np.ndarray) -> None:
    latents = keras_fvae.latents(model, x, average_tokens=True)
    assert_type(latents, dict[str, LayerLatents])
    assert_type(latents["query"].z1_mean, np.ndarray)
    probes = keras_fvae.probe_latents(model, x, y, {"color": [0, 1]})
    assert_type(probes, Probes)
    assert_type(probes[0], Probe)
    assert_type(probes[0].accuracy, float)
    accuracy = keras_fvae.evaluate_groups(model, x, y, [0, 1])
    assert_type(accuracy, GroupAccuracy)
    assert_type(accuracy.worst, float)
    assert_type(accuracy.worst_group, int | str)
    memory = keras_fvae.memory_per_device(make_model, optimizer_slots=1)
    assert_type(memory, MemoryPerDevice)
    assert_type(memory.total, int)
    plots = keras_fvae.plots
    figure = plots.plot_latents(latents["query"], y, title="query")
    assert_type(figure, matplotlib.figure.Figure)
    plots.plot_layers(latents).savefig("layers.png")
    plots.plot_probes(probes)


def distribute(layout_map: keras.distribution.LayoutMap) -> None:
    layout_map = keras_fvae.adapter_layout_map(layout_map)
    distribution = keras.distribution.ModelParallel(layout_map=layout_map)
    keras_fvae.memory_per_device(make_model, distribution)


def use_backbone() -> None:
    # KerasHub has no types, so its backbones have all methods.
    backbone = keras_hub.models.BertBackbone.from_preset("bert_tiny_en_uncased")
    backbone.enable_fvae_lora(rank=16)
    backbone.save_adapter("task.safetensors")
    keras_fvae.adapter_summary(backbone)
    print(keras_fvae.__version__)
