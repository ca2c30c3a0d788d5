#!/bin/sh
# An aarch64 python with onnxruntime on an x86-64 Debian, under qemu: a device to ask over ssh.
#
#     benchmarks/emulated_aarch64.sh FOLDER
#
# prints the path of that python, for `options = { host = "localhost", python = "..." }` in a
# profile. Needs apt's lists of arm64 (dpkg --add-architecture arm64 && apt-get update) and pip.
# onnxruntime 1.32 crashes at import under qemu 7.2; 1.24.4 runs, some hundred times as slow.
set -eu

folder=$(mkdir -p "$1" && cd "$1" && pwd)
cd "$folder"
mkdir -p debs wheels root host site
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libc6 libstdc++6 libgcc-s1
    zlib1g libexpat1 libssl3 libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libuuid1 libcrypt1"
(
    cd debs
    apt-get download qemu-user-static >/dev/null
    for package in $packages; do apt-get download "$package:arm64" >/dev/null; done
)
for deb in debs/*_arm64.deb; do dpkg-deb -x "$deb" root; done
for deb in debs/qemu-user-static_*.deb; do dpkg-deb -x "$deb" host; done
python3 -m pip download --quiet --no-deps --dest wheels --only-binary=:all: --python-version 3.11 \
    --platform manylinux_2_27_aarch64 --platform manylinux2014_aarch64 \
    --platform manylinux_2_28_aarch64 \
    onnxruntime==1.24.4 numpy==2.2.6 flatbuffers protobuf packaging
for wheel in wheels/*.whl; do python3 -m zipfile -e "$wheel" site; done
cat > python <<END
#!/bin/sh
PYTHONPATH=$folder/site PYTHONHOME=$folder/root/usr exec $folder/host/usr/bin/qemu-aarch64-static \\
    -L $folder/root $folder/root/usr/bin/python3.11 "\$@"
END
chmod +x python
./python -c "import onnxruntime, platform; assert platform.machine() == 'aarch64'" 2>/dev/null
echo "$folder/python"
