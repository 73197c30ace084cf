"""`python -m tic_megatron` is `tic-megatron`."""

from tic_megatron.cli import main

raise SystemExit(main())
