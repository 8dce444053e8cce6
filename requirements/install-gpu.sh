#!/usr/bin/env bash
# Set up the CUDA environments: install-gpu.sh PYTHON FOLDER [ARCHITECTURES [STEP...]]. Safe to interrupt and to run again.
#
# Needs NVIDIA's driver (580 or newer, for CUDA 13), Python 3.12 and a C++ compiler, and no CUDA toolkit: the compiler
# that llama.cpp and GPTQModel are built with comes from PyPI (cuda-build.lock). As in the image there are two
# environments, FOLDER/workbench and FOLDER/vllm, since vLLM pins much to versions of its own; a shell uses both after
# `. FOLDER/activate`. ARCHITECTURES ("90", or "86;89"): of the GPUs that llama.cpp is built for; by default those of the
# GPUs that are here. STEP: of compiler, engines, vllm and workbench, by default all.
set -euo pipefail
python=$1 folder=$2 architectures=${3:-}
shift "$(($# < 3 ? $# : 3))"
steps=" ${*:-compiler engines vllm workbench} "
here=$(cd "$(dirname "$0")" && pwd)
say() { printf '\n== %s\n' "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null ||
  stop "$python is not Python 3.12, which the CUDA environments are locked for; name one with: make gpu PYTHON=/path/to/python3.12"
command -v c++ >/dev/null || stop "c++ is missing; install a C++ compiler"
if [ -z "$architectures" ]; then
  architectures=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | tr -d ' .' | sort -u | paste -sd ';') ||
    architectures=""
  [ -n "$architectures" ] || stop "no NVIDIA GPU answers here (nvidia-smi): install NVIDIA's driver, or measure on the CPU with: make demo"
fi
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)
new() { [ -x "$folder/$1/bin/pip" ] || "$python" -m venv "$folder/$1"; }
pip() { local name=$1; shift; "$folder/$name/bin/python" -m pip "$@"; }
asked() { [[ $steps == *" $1 "* ]]; }
toolkit=$folder/build/lib/python3.12/site-packages/nvidia/cu13

if asked compiler; then
say "1/4 CUDA compiler (about 1 GB)"
new build
pip build install --quiet --require-hashes --no-deps -r "$here/cuda-build.lock"
# Packages carry the libraries under their full names only, and no stub of the driver's, which the linker wants.
ln -sfn lib "$toolkit/lib64"
for library in "$toolkit"/lib/lib{cudart,cublas,cublasLt}.so.13; do ln -sf "$(basename "$library")" "${library%.13}"; done
mkdir -p "$toolkit/lib/stubs"
# Every function of the driver, empty: a linker drops a library of which nothing is used, and the driver with it.
grep -oE '\bcu[A-Z][A-Za-z0-9_]*' "$toolkit/include/cuda.h" | sort -u | sed 's/.*/extern "C" void &() {}/' |
  c++ -shared -fPIC -Wl,-soname,libcuda.so.1 -x c++ - -o "$toolkit/lib/stubs/libcuda.so"
ln -sf libcuda.so "$toolkit/lib/stubs/libcuda.so.1"
fi

if asked engines; then
say "2/4 engines (about 6 GB) and llama.cpp for architecture $architectures, compiled: 5 minutes on many cores, 20 on two"
new workbench
# The CUDA libraries beside torch are found from llama.cpp's own: nobody has to import torch first. Not from pip's cache,
# which knows versions only: what it has may be built for another GPU, or for none.
. "$here/llama-cpp-flags.sh"
awk '/^llama-cpp-python==/{p=1} p{print} p&&!/\\$/{exit}' "$here/cuda.lock" >"$folder/llama-cpp.lock"
PATH="$folder/build/bin:$PATH" CUDA_HOME=$toolkit \
  LDFLAGS="-Wl,-rpath-link,$toolkit/lib/stubs -Wl,-rpath,'\$ORIGIN/../../nvidia/cu13/lib'" LIBRARY_PATH="$toolkit/lib/stubs" \
  CMAKE_ARGS="-DGGML_CUDA=on -DGGML_CUDA_NCCL=off -DCMAKE_CUDA_ARCHITECTURES=$architectures -DCUDAToolkit_ROOT=$toolkit -DCMAKE_CUDA_COMPILER=$toolkit/bin/nvcc" \
  pip workbench install --require-hashes --no-deps --no-cache-dir --no-binary llama-cpp-python -r "$folder/llama-cpp.lock"
pip workbench install --require-hashes --no-deps -r "$here/cuda.lock"
fi

if asked vllm; then
say "3/4 vLLM (about 8 GB)"
new vllm
pip vllm install --quiet --require-hashes --no-deps -r "$here/cuda-vllm.lock"
fi

if asked workbench; then
say "4/4 workbench itself"
pip workbench install --quiet --no-deps --no-build-isolation -e "$here/.."
# What a shell needs to use all of it: both environments, and the compiler for kernels that a checkpoint is loaded with.
cat >"$folder/activate" <<ACTIVATE
export CUDA_HOME="$toolkit" PATH="$toolkit/bin:$folder/build/bin:\$PATH"
. "$folder/workbench/bin/activate"
export WORKBENCH_PYTHON_VLLM="$folder/vllm/bin/python" WORKBENCH_PYTHON_VLLM_SERVE="$folder/vllm/bin/python"
ACTIVATE
fi
