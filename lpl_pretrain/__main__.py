"""`python -m lpl_pretrain` and `torchrun -m lpl_pretrain`: the same commands as `lpl-pretrain`."""

from lpl_pretrain.cli.main import main

main()
