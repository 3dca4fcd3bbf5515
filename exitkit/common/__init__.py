"""What every room uses: errors, checks of arguments, batches, files, hashes, tables, versions."""
