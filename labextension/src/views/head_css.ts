/** Looks that a live answer and a job share: the line above with its words and buttons. */
export const HEAD_CSS = `
.head { display: flex; flex-wrap: wrap; align-items: center; gap: 4px 12px; min-height: 28px; }
.head-words { flex: 1 1 220px; min-width: 0; overflow-wrap: anywhere; }
.head-title { font-weight: 600; margin-right: 8px; }
.head-tools { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 8px; margin-left: auto; }
.stop-control:empty { display: none; }
`
