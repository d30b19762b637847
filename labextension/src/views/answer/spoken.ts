/**
 * What a screen reader hears of an answer: whole sentences, and not more often than it can speak.
 *
 * The visible text is silent, for a live region that changes twenty times a second is noise. The end is said
 * by an element of the page, for the view goes away with its own.
 */

import { h } from '../../dom'

const EVERY_MS = 3000
const END_STAYS_MS = 10_000
// An answer may come faster than speech: what is older than this is read in the text itself.
const CHARACTERS_AT_MOST = 600
const SENTENCE_END = /[.!?…]["'”’)\]]*\s|[。！？]["'”’)\]」』）]*|\n/g
const UNSEEN = {
  position: 'absolute', width: '1px', height: '1px', margin: '-1px', overflow: 'hidden', clipPath: 'inset(50%)', whiteSpace: 'nowrap',
}

export class Spoken {
  readonly element = h('div', { class: 'visually-hidden spoken', 'aria-live': 'polite' })
  private readonly last = h('div', { class: 'llm-magic-spoken', 'aria-live': 'polite' })
  private readonly timer: ReturnType<typeof setInterval>
  private pending = ''
  private isOver = false

  constructor() {
    this.timer = setInterval(() => this.speak(), EVERY_MS)
    Object.assign(this.last.style, UNSEEN)
    document.body.append(this.last) // before it has words: only a change is spoken of
  }

  add(text: string): void {
    this.pending += text
  }

  /** Forget what was not said yet. */
  clear(): void {
    this.pending = ''
  }

  /** Say what is left, and these words. */
  end(words: string): void {
    if (this.isOver) return
    this.last.textContent = newest([this.pending.trim(), words].filter(Boolean).join('\n'))
    this.over()
    setTimeout(() => this.last.remove(), END_STAYS_MS)
  }

  /** Say nothing more. */
  stop(): void {
    if (this.isOver) return
    this.over()
    this.last.remove()
  }

  private over(): void {
    this.isOver = true
    clearInterval(this.timer)
  }

  private speak(): void {
    const end = lastSentenceEnd(this.pending)
    const said = this.pending.slice(0, end).trim()
    this.pending = this.pending.slice(end)
    if (said) this.element.textContent = newest(said)
  }
}

function newest(text: string): string {
  return text.slice(-CHARACTERS_AT_MOST)
}

function lastSentenceEnd(text: string): number {
  let end = 0
  for (const match of text.matchAll(SENTENCE_END)) end = match.index + match[0].length
  return end
}
