#!/usr/bin/env bash
# A virtual environment with a CUDA build of torch (several GB), and the pretended runtime: bash setup.sh FOLDER.
# Then FOLDER/python is an interpreter for which there is a GPU.
set -eu
here=$(cd "$(dirname "$0")" && pwd)
mkdir -p "${1:?the folder to set up}"
folder=$(cd "$1" && pwd)
[ -e "$folder/venv" ] || "${PYTHON:-python3}" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.11.0 torchvision==0.26.0 nvidia-cuda-nvcc nvidia-cuda-runtime nvidia-cuda-cccl \
  accelerate safetensors huggingface_hub scipy matplotlib rich timm transformers
export CUDA_HOME=${CUDA_HOME:-$(ls -d "$folder"/venv/lib/python3*/site-packages/nvidia/cu1* | head -1)}
bash "$here/build.sh" "$folder/runtime" > "$folder/env.sh"
cat > "$folder/python" <<END
#!/usr/bin/env bash
. "$folder/env.sh"
exec "$folder/venv/bin/python" "\$@"
END
chmod +x "$folder/python"
echo "$folder/python"
