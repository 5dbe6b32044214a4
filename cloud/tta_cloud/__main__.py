"""`python -m tta_cloud` is `tta-cloud`."""

from tta_cloud.cli import main

main()
