"""`llamarun` in a process that has a thread of its own before it begins: it must not fork its workers."""

import threading

from runtime.cli import main

if __name__ == "__main__":
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    main()
