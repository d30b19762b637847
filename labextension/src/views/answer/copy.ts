/** A button that copies the text there is by now. */

import { copyText } from '../../clipboard'
import { h } from '../../dom'
import type { Translate } from '../../i18n'

const SAID_MS = 4000

export class CopyControl {
  readonly element: HTMLElement
  private readonly said: HTMLElement
  private timer: ReturnType<typeof setTimeout> | undefined

  /** `select` marks the text where there is no clipboard, or it refuses. */
  constructor(
    private readonly t: Translate,
    private readonly text: () => string,
    private readonly select: () => void,
  ) {
    this.said = h('span', { class: 'muted copy-said', role: 'status' })
    const button = h('button', { type: 'button', class: 'copy', onclick: () => void this.copy() }, t('copy'))
    this.element = h('span', { class: 'copy-control' }, this.said, button)
  }

  stop(): void {
    clearTimeout(this.timer)
  }

  private async copy(): Promise<void> {
    if (await copyText(this.text())) this.say(this.t('copied'))
    else {
      this.select()
      this.say(this.t('copyFailed'))
    }
  }

  private say(words: string): void {
    this.said.textContent = words
    clearTimeout(this.timer)
    this.timer = setTimeout(() => (this.said.textContent = ''), SAID_MS)
  }
}
