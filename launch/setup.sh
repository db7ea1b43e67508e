# Makes .venv with everything in requirements.txt where it is missing or older than the list, and activates it.
# To be sourced by the other scripts, from the repository's root. PYTHON names the interpreter (default: python3).

# Installs what the list names, unless this very list was installed before.
install_list() {
    local list=$1 installed=.venv/installed-${1//\//-}
    if ! cmp -s "$list" "$installed"; then
        echo "installing $list into .venv (once; minutes, depending on the network)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$list" || {
            echo "error: pip could not install $list (its message is above); run the same command again" >&2
            exit 1
        }
        cp "$list" "$installed"
    fi
}

if ! .venv/bin/python -c '' 2>/dev/null; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "error: Python 3.11 or newer is needed; name one with PYTHON=/path/to/python3" >&2
        exit 1
    }
    "${PYTHON:-python3}" -m venv .venv || {
        echo "error: could not make .venv; on Debian and Ubuntu: apt install python3-venv" >&2
        exit 1
    }
fi
install_list requirements.txt
source .venv/bin/activate
