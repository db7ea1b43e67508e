# Makes .venv with everything in requirements.txt where it is missing or older than the list, and activates it.
# To be sourced by the other scripts, from the repository's root. PYTHON names the interpreter (default: python3).

if ! .venv/bin/python -c '' 2>/dev/null || ! cmp -s requirements.txt .venv/installed-requirements.txt; then
    echo "installing Relay's requirements into .venv (once, about 2 GB; minutes, depending on the network)"
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv .venv || {
        echo "error: could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || {
        echo "error: pip could not install requirements.txt (its message is above); run the same command again" >&2
        exit 1
    }
    cp requirements.txt .venv/installed-requirements.txt
fi
source .venv/bin/activate
