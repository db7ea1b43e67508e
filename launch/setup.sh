# Makes .venv with everything in requirements.txt where it is missing or older than the list, and activates it.
# To be sourced by the other scripts, from the repository's root. PYTHON names the interpreter (default: python3).

# Installs what the list names, unless this very list was installed before. More words are options of pip.
install_list() {
    local list=$1 installed=.venv/installed-${1//\//-}
    shift
    if ! cmp -s "$list" "$installed"; then
        echo "installing $list into .venv (once; minutes, depending on the network)"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" -r "$list" || {
            echo "error: pip could not install $list (its message is above); run the same command again" >&2
            exit 1
        }
        cp "$list" "$installed"
    fi
}

# What Relay runs on: first torch, whose build depends on the card, then all else, where every file must have the SHA-256
# that it had when it was chosen. An index that has builds of its own, as some clusters do, serves with UNLOCKED=1.
install_all() {
    if [ "${UNLOCKED:-}" != 1 ] && ! cmp -s launch/requirements.lock .venv/installed-launch-requirements.lock; then
        grep '^torch==' requirements.txt > .venv/torch.txt
        install_list .venv/torch.txt
        install_list launch/requirements.lock --no-deps --require-hashes
    fi
    install_list requirements.txt  # by now it only looks whether all is there
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
install_all
source .venv/bin/activate
if [ "${BASH_SOURCE[0]}" = "$0" ]; then echo "All is installed. In each new shell: source .venv/bin/activate"; fi
