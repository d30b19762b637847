/** How far Apply or a load is, with Cancel. */

import { h, setText } from '../../dom'
import type { Translate } from '../../i18n'
import { formatSeconds } from '../../units'
import type { ProgressEvent } from '../../wire'
import type { Editor } from './editor'
import { PhaseBar, phaseAmount, phaseName } from '../phase'

export interface Progress {
  element: HTMLElement
  show: (editor: Editor) => void
}

export function makeProgress(t: Translate, cancel: () => void): Progress {
  const bar = new PhaseBar(t)
  const words = h('span', { class: 'small num' })
  const button = h('button', { type: 'button', onclick: cancel }, t('cancel')) as HTMLButtonElement
  const element = h('div', { class: 'job', hidden: true }, h('div', { class: 'job-bar' }, bar.element, words), button)
  return {
    element,
    show({ isApplying, progress }) {
      element.hidden = !isApplying && !progress
      if (element.hidden) return
      const text = progressWords(t, progress)
      setText(words, text)
      bar.show(progress, text)
    },
  }
}

/** `"moving · 12 of 40 blocks · layers.12 · about 5.0 s left"`. */
function progressWords(t: Translate, progress: ProgressEvent | null): string {
  const name = phaseName(progress, t)
  if (!progress?.phase) return name
  const { detail, elapsed_s: elapsed, left_s: left } = progress
  const time = left > 0 ? t('phaseLeft', { time: formatSeconds(left) }) : elapsed >= 1 ? formatSeconds(elapsed) : ''
  return [name, phaseAmount(progress, t), detail, time].filter(Boolean).join(' · ')
}
