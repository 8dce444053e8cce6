#!/usr/bin/env bash
# The image's steps where there is no GPU and no Docker: image-check.sh PYTHON FOLDER ARCHITECTURE [STEP...].
#
# Each step runs alone and goes on where it was, by default all of them in this order:
#   compiler   NVIDIA's from PyPI (1 GB)
#   engines    the image's environment (6 GB), in which llama.cpp is compiled for ARCHITECTURE ("90"); then imported as
#              the workers do, beside a stub of the driver
#   vllm       vLLM's environment (8 GB), imported likewise
#   gptqmodel  the kernels that GPTQModel compiles when a checkpoint is loaded; they stay in FOLDER/gptqmodel
#   kernels    our own kernels compiled: registers, spills, widths of loads; with the image's Triton, or PYTHON's
# What is printed last is a line a step: its name, seconds, and whether it went well. Exit code 1 if one did not.
set -uo pipefail
[ $# -ge 3 ] || { sed -n 2,3p "$0" >&2; exit 2; }
python=$1 folder=$2 architecture=$3
shift 3
here=$(cd "$(dirname "$0")" && pwd)
known="compiler engines vllm gptqmodel kernels"
for step in "$@"; do
  [[ " $known " == *" $step "* ]] || { echo "error: unknown step '$step'. Known: $known" >&2; exit 2; }
done
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
toolkit=$folder/build/lib/python3.12/site-packages/nvidia/cu13
engines=$folder/workbench/bin/python

compiler() {
  "$here/install-gpu.sh" "$python" "$folder" "$architecture" compiler && "$toolkit/bin/nvcc" --version
}

engines() {
  "$here/install-gpu.sh" "$python" "$folder" "$architecture" engines &&
    LD_LIBRARY_PATH=$toolkit/lib/stubs "$engines" -P "$here/imported.py" llama_cpp torch transformers gptqmodel gguf triton
}

vllm() {
  "$here/install-gpu.sh" "$python" "$folder" "$architecture" vllm &&
    LD_LIBRARY_PATH=$toolkit/lib/stubs "$folder/vllm/bin/python" -P "$here/imported.py" \
      cuda.core cuda.bindings.driver torch triton transformers vllm vllm._C_stable_libtorch
}

gptqmodel() {
  # Its compiler wants to see a GPU and, told for which architecture, asks nothing of it.
  PATH="$folder/build/bin:$PATH" CUDA_HOME=$toolkit LD_LIBRARY_PATH=$toolkit/lib/stubs MAX_JOBS=$(nproc) \
    TORCH_CUDA_ARCH_LIST="${architecture%?}.${architecture: -1}" GPTQMODEL_CPU_WORKERS=4 \
    GPTQMODEL_MARLIN_FP16_BUILD_ROOT=$folder/gptqmodel/fp16 GPTQMODEL_MARLIN_BF16_BUILD_ROOT=$folder/gptqmodel/bf16 \
    "$engines" -P - <<'PYTHON'
import torch
from gptqmodel import extension

torch.cuda.is_available = lambda: True
for name in ("marlin_fp16", "marlin_bf16"):
    print(name, extension.load(name))
PYTHON
}

kernels() {
  local with=$python
  [ -x "$engines" ] && with=$engines
  "$with" -P "$here/../kernels/static_table.py" --architectures "$architecture" 2>&1 | tee "$folder/kernels.txt"
  # The table's exit code counts what its last column says is not yet so; here it must be whole, and nothing may spill.
  [ -s "$folder/kernels.txt" ] && ! grep -qE 'Traceback|Error|spills' "$folder/kernels.txt"
}

lines=() code=0
for step in ${*:-$known}; do
  printf '\n== %s\n' "$step" >&2
  SECONDS=0
  if "$step"; then verdict="went well"; else verdict="FAILED" code=1; fi
  lines+=("$(printf '%-10s %6d s  %s' "$step" "$SECONDS" "$verdict")")
done
printf '\n'
printf '%s\n' "${lines[@]}"
exit $code
