"""What a type checker refuses.

Nobody runs it. Were one of the lines accepted, mypy would say that its
`type: ignore` is not needed.
"""

import keras
import numpy as np

import keras_fvae

model = keras.Sequential()
config = keras_fvae.LoRAConfig(4)
x = np.ones((2, 4))

keras_fvae.enable_adaptor(model, config)  # type: ignore[attr-defined]
keras_fvae.enable_adapter(model)  # type: ignore[call-arg]
keras_fvae.enable_adapter("model", config)  # type: ignore[arg-type]
keras_fvae.enable_adapter(model, keras_fvae.LoRAConfig)  # type: ignore[arg-type]
keras_fvae.enable_adapter(model, config, 4)  # type: ignore[arg-type]
keras_fvae.enable_adapter(model, config, [4])  # type: ignore[list-item]
keras_fvae.enable_adapter(model, config, {"query": "4"})  # type: ignore[dict-item]
keras_fvae.enable_adapter(model, config, None, ["head"])  # type: ignore[call-arg]
keras_fvae.enable_fvae_lora(model, "16")  # type: ignore[arg-type]
keras_fvae.enable_fvae_lora(model, config=config)  # type: ignore[arg-type]

keras_fvae.LoRAConfig(rank="4")  # type: ignore[arg-type]
keras_fvae.LoRAConfig(ranks=4)  # type: ignore[call-arg]
keras_fvae.FVAELoRAConfig(objective="vae")  # type: ignore[arg-type]
config.rank = 8  # type: ignore[misc]

keras_fvae.save_adapter(model)  # type: ignore[call-arg]
keras_fvae.save_adapter(model, 5)  # type: ignore[arg-type]
keras_fvae.save_adapter(model, "a.safetensors", "most")  # type: ignore[arg-type]
keras_fvae.set_adapter(model, "a.safetensors")  # type: ignore[arg-type]
keras_fvae.load_adapter(model, "a.safetensors", only=1)  # type: ignore[arg-type]
keras_fvae.finalize_adapter(model, strict=True)  # type: ignore[call-arg]
print(keras_fvae.adapter_summary(model).paths)  # type: ignore[attr-defined]
print(keras_fvae.read_adapter("a.safetensors")["query"])  # type: ignore[index]

keras_fvae.AdaptedDense(8)  # type: ignore[call-arg]
keras_fvae.AdaptedDense("8", config)  # type: ignore[arg-type]
keras_fvae.AdaptedConv2D(8, (3, 3, 3), config)  # type: ignore[arg-type]
keras_fvae.FVAELoRADense(8, config=config)  # type: ignore[arg-type]

keras_fvae.AdapterCheckpoint("a.safetensors", mode="most")  # type: ignore[arg-type]
keras_fvae.FVAELoRASchedule(kl_weight=0.5)  # type: ignore[arg-type]
keras_fvae.AdaLoRAAllocator(interval="10")  # type: ignore[arg-type]
keras_fvae.optimizers.OPLoRA()  # type: ignore[call-arg]
keras_fvae.optimizers.LoRARITE("fast")  # type: ignore[arg-type]

print(keras_fvae.latents(model, x).z1_mean)  # type: ignore[attr-defined]
keras_fvae.memory_per_device(model, "all")  # type: ignore[arg-type]
keras_fvae.plots.plot_latents(x, x)  # type: ignore[arg-type]
