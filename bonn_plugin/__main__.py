"""``python -m bonn_plugin`` is the command ``bonn``."""

from bonn_plugin.cli import main

main()
