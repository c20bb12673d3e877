from tools.export import main
from utils import run_cli

run_cli(main)
