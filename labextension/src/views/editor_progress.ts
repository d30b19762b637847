/** How far Apply or a load is, with Cancel. */

import { h, setText } from '../dom'
import type { Translate, Word } from '../i18n'
import { formatBytes, formatSeconds } from '../units'
import type { ProgressEvent } from '../wire'
import type { Editor } from './editor'
import { setAttribute } from './map_cells'

const PHASES: Record<NonNullable<ProgressEvent['phase']>, Word> = {
  importing: 'editImporting',
  reading: 'editReading',
  planning: 'editPlanning',
  downloading: 'editDownloading',
  converting: 'editConverting',
  loading: 'editLoading',
  quantizing: 'editQuantizing',
  moving: 'editMoving',
  measuring: 'editMeasuring',
  prefill: 'editPrefilling',
  generating: 'editGenerating',
}

export interface Progress {
  element: HTMLElement
  show: (editor: Editor) => void
}

export function makeProgress(t: Translate, cancel: () => void): Progress {
  const filled = h('div', { class: 'filled' })
  const bar = h('div', {
    class: 'progress', role: 'progressbar', 'aria-label': t('editProgress'), 'aria-valuemin': 0, 'aria-valuemax': 100,
  }, filled)
  const words = h('span', { class: 'small num' })
  const button = h('button', { type: 'button', onclick: cancel }, t('editCancel')) as HTMLButtonElement
  const element = h('div', { class: 'job', hidden: true }, h('div', { class: 'job-bar' }, bar, words), button)
  return {
    element,
    show({ isApplying, progress }) {
      element.hidden = !isApplying && !progress
      if (element.hidden) return
      const text = progress ? progressWords(t, progress) : t('editStarting')
      const part = progress && progress.total > 0 ? Math.min(1, progress.done / progress.total) : null
      setText(words, text)
      setAttribute(bar, 'aria-valuetext', text)
      if (part === null) bar.removeAttribute('aria-valuenow')
      else setAttribute(bar, 'aria-valuenow', (100 * part).toFixed(0))
      bar.classList.toggle('unknown', part === null)
      filled.style.width = part === null ? '30%' : `${(100 * part).toFixed(1)}%`
    },
  }
}

/** `"moving · 12 of 40 blocks · layers.12 · 3.1 s, about 5 s left"`. */
function progressWords(t: Translate, progress: ProgressEvent): string {
  const { phase, total, detail, elapsed_s: elapsed, left_s: left } = progress
  const word = phase === null ? undefined : PHASES[phase]
  return [
    word ? t(word) : '',
    total > 0 ? doneWords(t, progress) : '',
    detail,
    left > 0 ? t('editLeft', { time: formatSeconds(left) }) : elapsed >= 1 ? formatSeconds(elapsed) : '',
  ].filter(Boolean).join(' · ')
}

function doneWords(t: Translate, { done, total, unit }: ProgressEvent): string {
  if (unit === 'bytes' || unit === 'B') return t('editDone', { done: formatBytes(done), total: formatBytes(total) })
  const counts = { done: Math.round(done), total: Math.round(total) }
  return unit === 'blocks' ? t('editBlocksDone', counts) : `${t('editDone', counts)} ${unit}`.trim()
}
