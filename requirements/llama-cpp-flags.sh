# To be sourced before llama.cpp is compiled: for every processor but without Intel's AMX. On a processor with it
# llama.cpp ends with SIGSEGV in its first product: GCC's `_tile_loadconfig` names 8 of the 64 bytes that it reads, and
# the optimizer drops the others (seen with GCC 12 and llama-cpp-python 0.3.36; llama.cpp's issue 20824).
if echo | c++ -mno-amx-int8 -x c++ -fsyntax-only - 2>/dev/null; then
  export CFLAGS="${CFLAGS:-} -mno-amx-int8" CXXFLAGS="${CXXFLAGS:-} -mno-amx-int8"
fi
