"""`python -m privatelora.platform`: the `privatelora` command of this interpreter, as the demo starts its service."""

from privatelora.platform.cli import main

main()
