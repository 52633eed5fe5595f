"""What a batch consists of: the one place where its arrays are named."""

# int32 [rows, seq_len] each. labels are -1 where nothing is predicted; segment_ids number a row's documents from 1, 0 is
# padding; positions count within a document.
ROWS = ('tokens', 'labels', 'segment_ids', 'positions')
