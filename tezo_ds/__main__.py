from tezo_ds.cli import main

main()
