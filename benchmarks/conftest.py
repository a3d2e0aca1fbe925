def pytest_addoption(parser):
    parser.addoption("--json", metavar="PATH", help="write the rows of the benchmarks as JSON")
