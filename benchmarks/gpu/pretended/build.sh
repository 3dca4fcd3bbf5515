#!/usr/bin/env bash
# Build the pretended CUDA runtime into a folder, and print the variables that switch it on: eval "$(bash build.sh FOLDER)".
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=${1:?the folder to build into}
cuda=${CUDA_HOME:-$(ls -d /usr/local/cuda-1[2-9]* /usr/local/cuda 2>/dev/null | head -1)}
if [ ! -e "$cuda/include/cuda_runtime_api.h" ]; then
  echo "no headers of CUDA: pip install nvidia-cuda-runtime nvidia-cuda-nvcc, and set CUDA_HOME" >&2
  exit 1
fi
mkdir -p "$out"
gcc -O1 -shared -fPIC -w -I"$cuda/include" "$here/runtime.c" "$here/blas.c" -o "$out/libfakert.so" -ldl -lpthread
gcc -O1 -shared -fPIC -w -I"$cuda/include" -Wl,-soname,libcuda.so.1 "$here/driver.c" -o "$out/libcuda.so.1"
ln -sf libcuda.so.1 "$out/libcuda.so"
echo "export OMP_NUM_THREADS=1 LD_PRELOAD=$out/libfakert.so LD_LIBRARY_PATH=$out LIBRARY_PATH=$out TRITON_LIBCUDA_PATH=$out"
echo "export CUDA_HOME=$cuda TORCHINDUCTOR_CACHE_DIR=$out/inductor TRITON_CACHE_DIR=$out/triton"
