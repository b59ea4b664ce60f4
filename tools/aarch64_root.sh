#!/usr/bin/env bash
# A folder in which qemu-aarch64 runs Python with PyTorch and onnxruntime: FOLDER/root is Debian 12 for aarch64,
# FOLDER/site the packages. Needs debootstrap, dpkg and pip, and 6 GB: PyTorch's wheel for this machine wants its CUDA
# libraries to be imported. With the word onnxruntime behind the folder it is that package alone, and 0.6 GB.
set -euo pipefail
packages="torch numpy pytest pytest-timeout hypothesis tyro rich onnxruntime"
[ "${2:-}" = onnxruntime ] && packages="numpy onnxruntime"
[ -n "${1:-}" ] && [ $# -le 2 ] && [ "${2:-onnxruntime}" = onnxruntime ] || {
    echo "tools/aarch64_root.sh: '$*' given; wanted: tools/aarch64_root.sh FOLDER [onnxruntime]" >&2
    exit 2
}
python=${PYTHON:-.venv/bin/python}
root=$1/root site=$1/site
mkdir -p "$root" "$site"

debootstrap --foreign --arch=arm64 --variant=minbase \
    --include=python3.11,libstdc++6,libgomp1,libgfortran5,libffi8,libssl3,libsqlite3-0,libexpat1,libnuma1 bookworm "$root"
# Unpacking is all that is wanted: what debootstrap's second stage configures would have to run as aarch64.
for package in "$root"/var/cache/apt/archives/*.deb; do dpkg -x "$package" "$root"; done

platforms=(--platform manylinux2014_aarch64)
for minor in $(seq 17 28); do platforms+=(--platform "manylinux_2_${minor}_aarch64"); done
constraints=$(mktemp)
trap 'rm -f "$constraints"' EXIT
# Without the local part of the version, which this machine's builds of PyTorch have.
sed 's/^\(torch==[0-9.]*\).*/\1/' constraints.txt >"$constraints"
"$python" -m pip install --quiet --no-compile --target "$site" "${platforms[@]}" --python-version 3.11 --only-binary=:all: \
    --constraint "$constraints" $packages

# PyTorch's cpuinfo and oneDNN read what the processor is from these, and end the process where they are this machine's.
cpu=$root/sys/devices/system/cpu
mkdir -p "$root/proc" "$cpu"
: >"$root/proc/cpuinfo"
for number in 0 1; do
    printf 'processor\t: %s\nFeatures\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\nCPU part\t: 0xd0c\nCPU revision\t: 1\n\n' "$number" >>"$root/proc/cpuinfo"
    mkdir -p "$cpu/cpu$number/regs/identification" "$cpu/cpu$number/topology"
    echo 0x00000000413fd0c1 >"$cpu/cpu$number/regs/identification/midr_el1"
    echo 0 >"$cpu/cpu$number/topology/physical_package_id"
    echo "$number" >"$cpu/cpu$number/topology/core_id"
    echo "$number" >"$cpu/cpu$number/topology/thread_siblings_list"
    echo 0-1 >"$cpu/cpu$number/topology/core_siblings_list"
done
for name in possible present online; do echo 0-1 >"$cpu/$name"; done
