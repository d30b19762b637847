/** Looks of a live answer. */

import { HEAD_CSS } from '../head_css'

export const ANSWER_CSS = `${HEAD_CSS}
.answer-time { white-space: nowrap; }
.copy-control { display: inline-flex; flex-wrap: wrap; align-items: center; gap: 4px 8px; }
.answer-frame { position: relative; margin: 2px 0 8px; }
.answer-text {
  max-height: 60vh; min-height: 1.6em; overflow: auto; overscroll-behavior: auto; padding: 2px 2px 2px 0;
  white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: plaintext; font-size: 14px; line-height: 1.55;
}
.answer-text:focus-visible { outline-offset: 0; border-radius: 2px; }
.llm .newest {
  position: absolute; right: 14px; bottom: 8px; border-radius: 999px; box-shadow: 0 1px 6px rgba(0,0,0,.35); background: var(--page);
}
.answer-note { margin: 4px 0 10px; }
.answer-foot { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 20px; font-size: 12px; color: var(--muted); }
.figures { display: flex; flex-wrap: wrap; gap: 0 0; min-height: 1.5em; }
.figure:not(:last-child)::after { content: '·'; margin: 0 .55em; }
.place { display: flex; flex-wrap: wrap; align-items: center; gap: 2px 10px; }
.place-bar {
  display: flex; gap: 1px; width: 120px; height: 10px; border-radius: 3px; overflow: hidden; background: var(--page);
}
.place-part { flex: var(--part) 1 0; min-width: 3px; }
.place-words { display: flex; flex-wrap: wrap; gap: 0 12px; }
.place-word { white-space: nowrap; }
.place-swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; vertical-align: -1px; }
`
