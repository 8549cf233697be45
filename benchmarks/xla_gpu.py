"""What XLA lays out for a training step on a GPU, on a machine without one.

pip install "jax[cuda12]"   # in an environment of its own: 5 GB
python -m benchmarks.xla_gpu
python -m benchmarks.xla_gpu --size "BERT-base, batch 64" --methods LoRA HiRA

It compiles the step for an H200 on JAX and does not run it. Prints JSON, a line
for each method: `peak`, the GiB that the step holds at its peak, to which XLA
keeps, and `kernels`, how often it starts one. XLA tries no kernels out here, as
it would on a GPU, so another layout may be chosen there.
"""

import argparse
import json
import os
import re

# What would try kernels out, or needs a GPU to choose among them.
FLAGS = "--xla_gpu_autotune_level=0 --xla_gpu_enable_triton_gemm=false"
H200 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 150754820096
  memory_bandwidth: 4800000000000
  l2_cache_size: 52428800
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: 2048
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""


def main(arguments=None):
    os.environ["KERAS_BACKEND"] = "jax"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
    # The plugin would ask for a GPU.
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    from benchmarks import models

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--size", default="ViT-B/16, 12 blocks, batch 64", choices=models.SIZES
    )
    parser.add_argument("--dtype", default="mixed_bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["base", "LoRA", "FVAE-LoRA", "rematerialized"],
        choices=models.DEVICE_METHODS,
    )
    options = parser.parse_args(arguments)
    try:
        device = h200()
    except NotImplementedError:
        parser.error(
            "JAX has no compiler for GPUs here. In an environment of its own, "
            "install 'jax[cuda12]', and this package from its clone."
        )
    for method in options.methods:
        compiled = compile_step(
            options.size, method, options.dtype, options.rank, device
        )
        print(json.dumps({"method": method} | figures(compiled)), flush=True)


def h200():
    """JAX's device to compile for."""
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(
        platform="cuda", target_config=H200, topology="1x1x1"
    )
    return topology.devices[0]


def compile_step(size, method, dtype, rank, device):
    """The training step of a method, compiled by JAX for a device.

    Args:
        size: String, a key of `models.SIZES`.
        method: String, one of `models.DEVICE_METHODS`.
        dtype: String, the name of a dtype policy.
        rank: Integer.
        device: JAX's device.

    Returns:
        `jax.stages.Compiled`.
    """
    import jax
    import keras

    from benchmarks import models

    keras.utils.clear_session()
    keras.config.set_dtype_policy(dtype)
    task, x, y = models.make_adapted(models.SIZES[size], method, rank)
    # Metrics would have to see a batch first.
    task.compile(task.optimizer, task.loss, metrics=None, weighted_metrics=None)
    task.optimizer.build(task.trainable_variables)
    state = (
        task.trainable_variables,
        task.non_trainable_variables,
        task.optimizer.variables,
        task.metrics_variables,
    )
    placed = jax.sharding.SingleDeviceSharding(device)

    def describe(array):
        # As JAX takes it: NumPy's integers and floats have 32 bits there.
        dtype = jax.dtypes.canonicalize_dtype(array.dtype)
        return jax.ShapeDtypeStruct(array.shape, dtype, sharding=placed)

    arguments = keras.tree.map_structure(describe, (state, (x, y)))
    return (
        jax.jit(task.train_step, donate_argnums=0).lower(*arguments).compile()
    )


def figures(compiled):
    """What JAX knows of a compiled step.

    Args:
        compiled: What `compile_step` returns.

    Returns:
        Dict of `peak`, in GiB, and `kernels`.
    """
    from benchmarks.figures import laid_out

    peak = laid_out(compiled.memory_analysis())
    # What the step itself calls is in its last computation.
    _, entry = compiled.as_text().split("\nENTRY ")
    kernels = re.findall(r" (?:fusion|custom-call|dot|reduce|copy)\(", entry)
    return {"peak": peak / 2**30, "kernels": len(kernels)}


if __name__ == "__main__":
    main()
