#!/bin/sh
# Makes a Debian with Python 3.11 into a CPU Triton: the server that the PyPI package nvidia-pytriton carries, and the
# packages of converted models.
set -eu
here=$(dirname "$0")
. "$here/pip-settings.sh"
venv=/opt/conch/venv

python3 -m venv "$venv"
# numpy first: pytriton's own dependencies (its Python layer, which is not used here) stay out.
"$venv/bin/pip" install --constraint "$here/constraints.txt" --requirement "$here/model-requirements.txt"
"$venv/bin/pip" install --constraint "$here/constraints.txt" --no-deps nvidia-pytriton

# The package keeps the parts of its python back end apart; --backend-directory wants them in one folder.
package=$(echo "$venv"/lib/python3.*/site-packages)
backend=/opt/conch/backends/python
version=$("$venv/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
mkdir -p "$backend"
ln -s "$package/pytriton/tritonserver/backends/python/libtriton_python.so" "$backend/"
ln -s "$package/pytriton/tritonserver/backends/python/triton_python_backend_utils.py" "$backend/"
ln -s "$package/pytriton/tritonserver/python_backend_stubs/$version/triton_python_backend_stub" "$backend/"
ln -s "$package/pytriton/tritonserver/bin/tritonserver" /opt/conch/tritonserver.bin
ln -s "$package/nvidia_pytriton.libs" /opt/conch/libs
install -m 755 "$here/tritonserver-cpu" /usr/local/bin/tritonserver
PATH=$venv/bin:$PATH sh "$here/check-server.sh"
