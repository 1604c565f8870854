"""Writes files whole or not at all, and only over files. Needs the standard library alone.

    with atomic("a.bin", "b.bin") as (a, b):
        a.write(...)
"""
import contextlib
import errno
import os
import re
import stat

def destination(path):
    """(path, None), the path a file's or still nobody's, its links followed; or (None, open file): a device, a FIFO, or what
    this process has open already (/dev/stdout, the shell's >(...)) is written to as it is. Renaming over it would take it away."""
    path = os.fspath(path)
    for _ in range(40):  # as many links as Linux follows
        folder, name = os.path.split(path)
        if name.isdigit() and os.path.realpath(folder) == f"/proc/{os.getpid()}/fd":
            return None, open(os.dup(int(name)), "wb")
        if not os.path.islink(path):
            break
        path = os.path.join(folder, os.readlink(path))
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return path, None
    if stat.S_ISREG(mode):
        return path, None
    if stat.S_ISDIR(mode) or stat.S_ISBLK(mode):
        raise OSError(errno.EISDIR, "it is a folder" if stat.S_ISDIR(mode) else "it is a disk", path)
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY)  # a FIFO that nobody reads is refused, not waited for
    os.set_blocking(fd, True)
    return None, open(fd, "wb")

@contextlib.contextmanager
def atomic(*paths):
    """Yields one open file per path; they get their names together, or none of them does.

    Every file is on the disk (fsync) before the first is renamed, because a full disk or a file
    size limit may show only then. The temporary name ends in .tmp: a glob for *.bin never meets it.
    Links stay links, and a file that is replaced hands down its owner and permissions.
    """
    files, renames, leftovers = [], {}, {}  # renames: temporary name: final name
    try:
        for path in paths:
            target, f = destination(path)
            if f is None:
                folder = os.path.dirname(target) or "."
                if folder not in leftovers:  # listed once: there may be thousands of files
                    leftovers[folder] = [re.fullmatch(r"(.*)\.(\d+)\.tmp", name, re.S) for name in os.listdir(folder)]
                for old in filter(None, leftovers[folder]):  # what a killed process left
                    if old[1] == os.path.basename(target) and (int(old[2]) == os.getpid() or not os.path.exists(f"/proc/{old[2]}")):
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(os.path.join(folder, old[0]))
                temporary = f"{target}.{os.getpid()}.tmp"
                f = open(temporary, "xb")
                renames[temporary] = target
                with contextlib.suppress(FileNotFoundError):
                    old = os.stat(target)
                    with contextlib.suppress(PermissionError):  # only root can give a file away
                        os.chown(temporary, old.st_uid, old.st_gid)
                    os.chmod(temporary, old.st_mode & 0o777)
            files.append(f)
        yield files
        for f in files:
            f.flush()
            if f.name in renames:
                os.fsync(f.fileno())
            f.close()
        for temporary, target in renames.items():
            os.replace(temporary, target)
        for folder in {os.path.dirname(os.path.abspath(target)) for target in renames.values()}:
            fd = os.open(folder, os.O_RDONLY)  # the names themselves live in the folder
            os.fsync(fd)
            os.close(fd)
    finally:
        for f in files:
            with contextlib.suppress(OSError):  # close() flushes, and may fail once more
                f.close()
        for name in renames:
            with contextlib.suppress(OSError):
                os.unlink(name)
