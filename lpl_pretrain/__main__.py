"""`lpl-pretrain`, `python -m lpl_pretrain` and `torchrun -m lpl_pretrain`: the same commands."""

from lpl_pretrain.runtime.preempt import stop_request

stop_request()  # before the other imports: Ctrl-C is answered from here on

from lpl_pretrain.cli.main import main  # noqa: E402

if __name__ == "__main__":
    main()
