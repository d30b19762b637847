/** Words at a way: its bus and its speed, and what one token sends over it. */

import type { Translate } from '../../i18n'
import { formatBytes, formatSeconds } from '../../units'
import type { LinkState } from '../../wire'
import { rangeWords } from './facts'
import type { Path, Step } from './path'
import { textWidth } from './type'

export const LINE = 17
const LEAST_S = 1e-3

export interface Label {
  x: number
  y: number
  anchor: 'middle' | 'start'
  lines: string[]
  step: StepLabel | null
}

/** What one token sends: `2` or `2–5` in a pill, then bytes and seconds. */
export interface StepLabel {
  numbers: string
  words: string
  isLimiting: boolean
}

/** `↕ 25.0 GB/s`, or `↑ 25.0 GB/s ↓ 22.0 GB/s` where they differ; `up` are the links towards the processors. */
export function upDownWords(up: LinkState[], down: LinkState[], t: Translate): string {
  const [rising, falling] = [up, down].map(links => (links.length ? rangeWords(links, t) : ''))
  if (rising === falling) return `↕ ${rising}`
  return [rising && `↑ ${rising}`, falling && `↓ ${falling}`].filter(Boolean).join(' ')
}

/** The bus if it is one, `8 × PCIe 5 x16` where there are several of it. */
export function busWords(links: LinkState[], count: number, t: Translate): string {
  const names = [...new Set(links.map(link => link.name))].filter(Boolean)
  const name = names.join(', ')
  return name && count > 1 ? t('machineEach', { count, name }) : name
}

/** One line where it fits, else two. */
export function wrapped(parts: string[], room: number): string[] {
  const found = parts.filter(Boolean)
  const line = found.join(' · ')
  return textWidth(line) <= room ? [line] : found
}

export function stepLabel(steps: Step[], path: Path, t: Translate): StepLabel | null {
  const [first, last] = [steps[0], steps.at(-1)]
  if (!first || !last) return null
  const bytes = steps.reduce((sum, step) => sum + step.bytes, 0)
  const seconds = Math.max(...steps.map(step => step.seconds))
  const isLimiting = steps.some(step => path.limiting.includes(step))
  return {
    numbers: first === last ? String(first.number) : `${first.number}–${last.number}`,
    words: t('machineStepShort', { size: formatBytes(bytes), time: timeWords(seconds, t) }),
    isLimiting,
  }
}

export function timeWords(seconds: number, t: Translate): string {
  if (!seconds) return t('machineNoTime')
  return seconds < LEAST_S ? `< ${formatSeconds(LEAST_S)}` : formatSeconds(seconds)
}

/** Height of a label; room for a step is kept when the path is not shown, so that nothing jumps. */
export function heightOf(label: Pick<Label, 'lines' | 'step'>): number {
  return LINE * (label.lines.length + (label.step ? 1 : 0))
}
