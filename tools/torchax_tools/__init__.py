"""The programs that come with torchax: the `torchax-ops` command (`cli`) and the benchmark (`bench`)."""
