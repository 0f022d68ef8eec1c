"""Makes the compiled texts of MaxText that benchmarks/plan_accuracy.py times.

    python plan_peer.py FOLDER [NAME...]

Run it with the Python of an environment that has `maxtext[tpu]==0.2.5` and nothing of this package: it compiles the
published recipes for slices that are not there, minutes each, and writes FOLDER/NAME.hlo. The settings are those of the
recipes that the rows of plan_accuracy.py name; flags that libtpu no longer takes on a machine are left out.
"""

import os
import sys
from pathlib import Path

FUSED = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_enable_async_collective_fusion=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true --xla_tpu_overlap_compute_collective_tc=true "
    "--xla_enable_async_all_gather=true"
)
V5P = (
    "--xla_enable_async_collective_permute=true --xla_tpu_enable_ag_backward_pipelining=true "
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true "
    "--xla_tpu_overlap_compute_collective_tc=true --xla_enable_async_all_gather=true"
)
V5P_SPARSE_CORE = (
    f"{V5P} --xla_sc_disable_megacore_partitioning=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=false"
)
OVERLAP = "--xla_tpu_enable_data_parallel_all_reduce_opt=true --xla_tpu_data_parallel_opt_different_sized_ops=true"
V6E = (
    "--xla_tpu_scoped_vmem_limit_kib=98304 --xla_tpu_use_minor_sharding_for_major_trivial_input=true "
    "--xla_tpu_relayout_group_size_threshold_for_reduce_scatter=1 --xla_tpu_assign_all_reduce_scatter_layout=true "
    f"{OVERLAP}"
)
TPU7X = (
    "--xla_tpu_scoped_vmem_limit_kib=65536 --xla_tpu_enable_sparse_core_collective_offload_all_gather=true "
    "--xla_tpu_enable_sparse_core_collective_offload_2d_all_gather=true --xla_tpu_use_tc_device_shape_on_sc=true "
    "--xla_sc_disable_megacore_partitioning=true --xla_tpu_enable_async_collective_fusion_fuse_all_gather=false "
    "--xla_enable_async_all_gather=true --xla_tpu_prefer_async_allgather_to_allreduce=true "
    "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true "
    "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true "
    "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true "
    "--xla_tpu_use_single_sparse_core_for_all_gather_offload=true"
)
BLOCKS = (
    "sa_block_q=2048 sa_block_kv=2048 sa_block_kv_compute=2048 sa_block_q_dkv=2048 sa_block_kv_dkv=2048 "
    "sa_block_kv_dkv_compute=2048 sa_block_q_dq=2048 sa_block_kv_dq=2048 sa_use_fused_bwd_kernel=True"
)
OFFLOADED = "remat_policy=custom decoder_layer_input=offload query_proj=offload key_proj=offload value_proj=offload"
SCALED = "max_target_length=2048"

# Name: (slice by its Google Cloud name, arguments, flags of the compiler).
RECIPES = {
    "v5p_32b": (
        "v5p-128",
        f"{SCALED} per_device_batch_size=6 remat_policy=minimal global_parameter_scale=32 ici_tensor_parallelism=4",
        V5P_SPARSE_CORE,
    ),
    "v5p_64b": (
        "v5p-128",
        f"{SCALED} per_device_batch_size=3 remat_policy=minimal global_parameter_scale=64 ici_tensor_parallelism=4",
        V5P,
    ),
    "v5e_16b": ("v5e-256", f"{SCALED} per_device_batch_size=6 remat_policy=full global_parameter_scale=16", FUSED),
    "v5e_32b": ("v5e-256", f"{SCALED} per_device_batch_size=4 remat_policy=full global_parameter_scale=32", FUSED),
    "v6e_8b": (
        "v6e-256",
        f"model_name=llama3.1-8b per_device_batch_size=4 max_target_length=8192 {OFFLOADED} out_proj=offload {BLOCKS}",
        V6E,
    ),
    "v6e_70b": (
        "v6e-256",
        f"model_name=llama3.1-70b per_device_batch_size=4 max_target_length=8192 {OFFLOADED} {BLOCKS}",
        V6E,
    ),
    "v6e_mixtral": (
        "v6e-256",
        f"model_name=mixtral-8x7b per_device_batch_size=12 max_target_length=4096 {OFFLOADED} out_proj=offload "
        "sa_block_q=2048 sa_block_q_dkv=2048 sa_block_q_dq=2048 megablox=False sparse_matmul=False "
        "capacity_factor=1.25",
        f"--xla_tpu_scoped_vmem_limit_kib=81920 {OVERLAP}",
    ),
    "tpu7x_70b": (
        "tpu7x-128",
        "model_name=llama3.1-70b per_device_batch_size=2 max_target_length=8192 remat_policy=custom "
        "decoder_layer_input=device context=device query_proj=device key_proj=device value_proj=device opt_type=adamw "
        "mu_dtype=bfloat16 sa_block_q=2048 sa_block_kv=1024 sa_block_kv_compute=512 sa_block_q_dkv=2048 "
        "sa_block_kv_dkv=2048 sa_block_kv_dkv_compute=256 sa_use_fused_bwd_kernel=True",
        TPU7X,
    ),
    # The two that our own step is held against, with the compiler's defaults.
    "llama2_7b_v5p": (
        "v5p-128",
        "model_name=llama2-7b per_device_batch_size=4 max_target_length=2048 remat_policy=full weight_dtype=float32",
        "",
    ),
    "mixtral_8x7b_v5p": (
        "v5p-256",
        "model_name=mixtral-8x7b per_device_batch_size=4 max_target_length=4096 remat_policy=full weight_dtype=float32 "
        "megablox=True sparse_matmul=True",
        "",
    ),
}
ALWAYS = (
    "compile_topology_num_slices=1 enable_checkpointing=false run_name=plan base_output_directory=/tmp "
    "dataset_type=synthetic attention=flash use_iota_embed=true ici_fsdp_parallelism=-1"
)


def compile_recipe(name: str, folder: Path) -> None:
    from maxtext.trainers.pre_train import train_compile

    slice_name, arguments, flags = RECIPES[name]
    make = train_compile.jit_and_compile

    def make_and_keep(*args, **kwargs):
        compiled = make(*args, **kwargs)
        (folder / f"{name}.hlo").write_text(compiled.as_text(), encoding="utf-8")
        print(name, compiled.memory_analysis(), flush=True)
        return compiled

    train_compile.jit_and_compile = make_and_keep
    config = Path(train_compile.__file__).parents[2] / "configs" / "base.yml"
    flags = [f"compile_xla_flags={flags}"] if flags else []
    given = [f"compile_topology={slice_name}", *arguments.split(), *ALWAYS.split(), *flags]
    train_compile.main(["train_compile", str(config), *given])


def main() -> None:
    """One process a recipe: MaxText keeps what it is given for the whole process."""
    folder, *names = sys.argv[1:]
    if len(names) == 1:
        os.environ |= {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
        return compile_recipe(names[0], Path(folder))
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name in names or RECIPES:
        if not (Path(folder) / f"{name}.hlo").exists():
            os.spawnl(os.P_WAIT, sys.executable, sys.executable, __file__, folder, name)
    return None


if __name__ == "__main__":
    main()
